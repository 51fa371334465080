"""Events: what a running search reports to whoever streams it."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Candidate:
    """One scored candidate. ``text`` is what it added to its parent, tags included."""

    node: int
    parent: int
    text: str
    score: float
    closed: bool
    kept: bool


@dataclass(frozen=True)
class Candidates:
    """A stage (None: the whole answer) was sampled, scored and cut down; everything here may still be retraced."""

    stage: str | None
    round: int
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True)
class Retrace:
    """No candidate of ``stage`` was good enough: round ``round`` starts again from sampling stage ``to``."""

    stage: str
    to: str
    round: int
    cutoff: float | None = field(default=None, compare=False)
    score: float | None = field(default=None, compare=False)  # None: too few candidates closed


@dataclass(frozen=True)
class StageFinal:
    """The text of a stage (or, with None, of the whole answer) that no retrace can take back any more."""

    stage: str | None
    text: str


@dataclass(frozen=True)
class TextDelta:
    """New final text of a search without stages, token by token."""

    text: str


Event = Candidates | Retrace | StageFinal | TextDelta
