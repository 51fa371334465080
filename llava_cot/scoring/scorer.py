"""What a scorer is: a function from candidates to numbers, the larger the better."""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from llava_cot.core import Program
from llava_cot.stages import LLAVA_COT, Grammar

if TYPE_CHECKING:
    from PIL.Image import Image

T = TypeVar("T", bound=Callable)


@dataclass(frozen=True)
class Span:
    """What a scorer sees of a candidate: one stage of it, or its whole path.

    ``notes`` is for the scorer to write in what the trace is to show.
    """

    text: str  # tags included
    tokens: list[int]
    logprobs: list[float]  # of each token under the model, nats
    entropies: list[float]  # of the model's distribution at each token, nats
    certainties: list[float] = field(default_factory=list)  # KL(uniform, that distribution) at each token, nats
    stage: str | None = None  # None: a whole answer
    path_text: str = ""  # everything from the first stage to its end
    closed: bool = True
    question: str | None = None
    image: "Image | None" = None
    grammar: Grammar = LLAVA_COT
    id: int = -1  # the continuation that it ends with, for scorers that read or draw on from there
    root: int = 0  # that of the prompt
    tokens_left: int = 0  # that its path may still get
    notes: dict[str, float] = field(default_factory=dict)


# Called with all new candidates of one step of a search; one number for each. One that is not finite, and one that
# raises, mark their candidate. A scorer that wants the model, or the candidates of several searches at once, is a
# generator: it yields requests (``llava_cot.core``), is sent their replies, and returns the numbers.
Scorer = Callable[[Sequence[Span]], Sequence[float] | Program[Sequence[float]]]


def groupwise(scorer: T) -> T:
    """Marks a scorer whose numbers depend on the other candidates: it is given the whole pool, equal ones too."""
    scorer.groupwise = True  # type: ignore[attr-defined]
    return scorer


def is_groupwise(scorer: Scorer) -> bool:
    return getattr(scorer, "groupwise", False)


class WrongNumber(ValueError):
    """A scorer returned another number of scores than it was given spans."""


def ask(scorer: Scorer, spans: Sequence[Span]) -> Program[Sequence[float]]:
    """``yield from ask(...)``: the scores of a plain scorer or of one that is a generator, one for each span.

    Raises:
        WrongNumber: it returns another number of scores.
    """
    scores = scorer(spans)
    if isinstance(scores, Generator):
        scores = yield from scores
    if len(scores) != len(spans):
        raise WrongNumber(f"scorer must return {len(spans)} scores, one per span, got {len(scores)}")
    return scores


def name_of(scorer: object) -> str:
    """What settings, calibrations and traces call a scorer or a policy."""
    return scorer if isinstance(scorer, str) else getattr(scorer, "__name__", type(scorer).__name__)
