"""What a scorer is: a function from candidates to numbers, the larger the better."""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from llava_cot.engine.branch import Branch
from llava_cot.stages import LLAVA_COT, Grammar

if TYPE_CHECKING:
    from PIL.Image import Image


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
    branch: Branch | None = None  # for scorers that read or draw on from here
    notes: dict[str, float] = field(default_factory=dict)


# Called with all new candidates of one step of a search; one number for each. One that is not finite, and one that
# raises, mark their candidate. A scorer that wants the model, or the candidates of several searches at once, is a
# generator: it yields requests (``llava_cot.engine.branch``), is sent their replies, and returns the numbers.
Scorer = Callable[[Sequence[Span]], Sequence[float] | Generator[Any, Any, Sequence[float]]]


def groupwise(scorer: Scorer) -> Scorer:
    """Marks a scorer whose numbers depend on the other candidates: it is given the whole pool, equal ones too."""
    scorer.groupwise = True  # type: ignore[attr-defined]
    return scorer
