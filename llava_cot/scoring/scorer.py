"""A scorer is a function from candidates to numbers, the larger the better."""

import reprlib
from collections.abc import Callable, Generator, Mapping, Sequence, Set, Sized
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from llava_cot.core import Feature, Program
from llava_cot.stages import LLAVA_COT, Grammar

if TYPE_CHECKING:
    from PIL.Image import Image

T = TypeVar("T", bound=Callable)


# The token ids of a user's turn, of which the text is given, behind a reply that ends with the given token ids, up to
# where the next reply begins.
TurnTokens = Callable[[str, Sequence[int]], Sequence[int]]


@dataclass(frozen=True)
class Span:
    """A candidate as a scorer sees it: one stage, or the whole path.

    A scorer may write numbers into ``notes``, which the trace shows. It may keep what it wants to find again in
    ``memo``, under a key of its own: the candidates of a search share it, and it is emptied when the search ends.
    """

    text: str  # tags included
    tokens: list[int]
    logprobs: list[float]  # log-prob of each token under the model, in nats
    entropies: list[float]  # entropy of the model's distribution at each token, in nats
    certainties: list[float] = field(default_factory=list)  # KL(uniform, that distribution) at each token, in nats
    stage: str | None = None  # None: a whole answer
    path_text: str = ""  # everything from the first stage to the end of this span
    closed: bool = True
    question: str | None = None
    load_images: "Callable[[], Sequence[Image]]" = field(default=tuple, repr=False)
    grammar: Grammar = LLAVA_COT
    id: int = -1  # the id of the continuation that it ends with, for scorers that extend or expand it
    root: int = 0  # the id of the prompt
    tokens_left: int = 0  # the most tokens that its path may still get
    turn_tokens: TurnTokens | None = field(default=None, repr=False)  # for scorers that ask the turns of the grammar
    notes: dict[str, float] = field(default_factory=dict)
    memo: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def images(self) -> "Sequence[Image]":
        """The images of the question in RGB, which are opened when they are first asked for.

        There is none if the question is about none, or if the search was given tokens only.
        """
        return self.load_images()

    @property
    def image(self) -> "Image | None":
        """The only image, or None.

        Raises:
            ValueError: there are several.
        """
        images = self.images
        if len(images) > 1:
            raise ValueError(f"image must be one for this scorer, got {len(images)}")
        return images[0] if images else None


# A scorer is called with all new candidates of one step of a search and returns one number for each. A number that is
# not finite, or an exception, marks its candidate as failed. A scorer that asks the model, or that scores candidates of
# several searches in one call, is a generator: it yields requests (``llava_cot.core``), is sent their replies, and
# returns the numbers. It runs in the thread that steps the engine, and must not wait for another thread that does.
Scorer = Callable[[Sequence[Span]], Sequence[float] | Program[Sequence[float]]]


def groupwise(scorer: T) -> T:
    """Mark a scorer whose numbers depend on the other candidates. It gets the whole pool, equal candidates included."""
    scorer.groupwise = True  # type: ignore[attr-defined]
    return scorer


def needing(*features: Feature) -> Callable[[T], T]:
    """Mark a scorer that needs more of the back end than the texts of candidates."""

    def mark(scorer: T) -> T:
        scorer.needs = frozenset(features)  # type: ignore[attr-defined]
        return scorer

    return mark


def needs_of(*scorers: Scorer) -> frozenset[Feature]:
    """Return what scorers need of the back end, by their attribute ``needs``. Without one a scorer needs nothing."""
    return frozenset().union(*(getattr(scorer, "needs", ()) for scorer in scorers))


def is_groupwise(scorer: Scorer) -> bool:
    return getattr(scorer, "groupwise", False)


class WrongNumber(ValueError):
    """Raised if a scorer does not return one score per span."""


def ask(scorer: Scorer, spans: Sequence[Span]) -> Program[Sequence[float]]:
    """Return one score for each span, from a plain scorer or from one that is a generator. Use ``yield from ask(...)``.

    Raises:
        WrongNumber: the scorer does not return one score per span.
    """
    scores = scorer(spans)
    if isinstance(scores, Generator):
        scores = yield from scores
    if isinstance(scores, (Mapping, Set)):
        raise WrongNumber(f"scorer must return a list of scores, one per span, got a {type(scores).__name__}")
    if not isinstance(scores, Sized) or len(scores) != len(spans):
        got = len(scores) if isinstance(scores, Sized) else reprlib.repr(scores)
        raise WrongNumber(f"scorer must return {len(spans)} scores, one per span, got {got}")
    return scores


def check_scorer(name: str, scorer: object) -> None:
    """Raise ``TypeError`` unless the argument ``name`` can be called with candidates, which a class can't."""
    if isinstance(scorer, type):
        raise TypeError(f"{name} must be a scorer, got the class {scorer.__name__}: give an object of it")
    if not callable(scorer):
        raise TypeError(f"{name} must be a scorer that can be called, got {reprlib.repr(scorer)}")


def name_of(scorer: object) -> str:
    """Return the name of a scorer or a policy in settings, calibrations and traces."""
    return scorer if isinstance(scorer, str) else getattr(scorer, "__name__", type(scorer).__name__)
