"""A candidate as the reports show it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """A candidate. ``state`` is "winner" on the path to the answer, and "kept" or "pruned" elsewhere.

    While the search is running, a candidate that nothing has been decided about yet is "drawn".
    """

    id: int
    parent: int
    stage: str | None
    column: int
    round: int
    seed: int
    text: str
    tokens: int
    logprob: float | None  # mean over its tokens, in nats
    sampling_logprob: float | None  # the same under the filtered distribution that was sampled
    score: float | None
    finish: str
    closed: bool
    violation: str | None  # how it left the grammar; None if it did not
    error: str | None  # why its scorer failed; None if it did not
    notes: dict[str, float]
    seconds: float  # from the start of the search to its last token
    state: str
    kept_in: int | None  # the round that kept it, if that is later than its own
    in_answer: bool  # whether it is part of a returned answer
    answer: int | None  # the number, from 1, of the returned answer that it ends

    @property
    def label(self) -> str:
        mark = {"winner": "★", "kept": "●", "pruned": "○", "drawn": "◌"}[self.state]
        late = f"{'' if self.state == 'kept' else ', kept'} in round {self.kept_in}" if self.kept_in else ""
        return f"{mark} {self.state}{late}"

    @property
    def returned(self) -> str:
        """The label of a candidate that ends a returned answer other than the first; empty for all others."""
        return f"answer {self.answer}" if self.answer and self.answer > 1 else ""

    @property
    def flaw(self) -> str:
        if self.closed:
            return ""
        return f"unclosed: {self.violation}" if self.violation else f"unclosed ({self.finish})"
