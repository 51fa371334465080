"""What a scorer is: a function from candidates to numbers, the larger the better."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Span:
    """What a scorer sees of a candidate: one stage of it, or its whole path."""

    text: str  # tags included
    tokens: list[int]
    logprobs: list[float]  # of each token under the model, nats
    entropies: list[float]  # of the model's distribution at each token, nats


# Called with all new candidates of a step at once; one number for each. NaN counts as -inf.
Scorer = Callable[[Sequence[Span]], Sequence[float]]
