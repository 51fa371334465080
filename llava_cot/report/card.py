"""A candidate as the views show it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """A candidate. ``state`` is "winner" on the path to the answer, else "kept" or "pruned"."""

    id: int
    parent: int
    stage: str | None
    column: int
    round: int
    seed: int
    text: str
    tokens: int
    logprob: float | None  # mean over its tokens, nats
    sampling_logprob: float | None  # the same under the distribution that they were drawn from
    score: float | None
    finish: str
    closed: bool
    violation: str | None  # how it left the grammar
    error: str | None  # why it has no score of its own
    notes: dict[str, float]
    seconds: float  # from the start of the search to its last token
    state: str
    kept_in: int | None  # the round that went on with it, where that is a later one than its own
    in_answer: bool  # on the way to any of the returned answers
    answer: int | None  # which of the returned answers it ends, from 1

    @property
    def label(self) -> str:
        mark = {"winner": "★", "kept": "●", "pruned": "○"}[self.state]
        late = f"{'' if self.state == 'kept' else ', kept'} in round {self.kept_in}" if self.kept_in else ""
        return f"{mark} {self.state}{late}"

    @property
    def returned(self) -> str:
        """What there is to say of one that was returned besides the first."""
        return f"answer {self.answer}" if self.answer and self.answer > 1 else ""

    @property
    def flaw(self) -> str:
        if self.closed:
            return ""
        return f"unclosed: {self.violation}" if self.violation else f"unclosed ({self.finish})"
