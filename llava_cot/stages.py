"""The stage grammar: which tags, in which order, and what a text made of them."""

from dataclasses import dataclass
from enum import StrEnum


class Stage(StrEnum):
    """The four stages of LLaVA-CoT, in order."""

    SUMMARY = "SUMMARY"
    CAPTION = "CAPTION"
    REASONING = "REASONING"
    CONCLUSION = "CONCLUSION"

    @property
    def open_tag(self) -> str:
        return f"<{self.value}>"

    @property
    def close_tag(self) -> str:
        return f"</{self.value}>"


STAGES = tuple(Stage)


class Outcome(StrEnum):
    """How a stage stands in a text."""

    COMPLETE = "complete"  # opened and closed once
    UNCLOSED = "unclosed"  # opened, and the text ends before it closes
    MISSING = "missing"  # its opening tag is not there
    REPEATED = "repeated"  # opened more than once; the text is that of the first


@dataclass(frozen=True)
class StageText:
    """One stage of a parsed text: the stripped text between its tags, and how it was found."""

    stage: Stage
    text: str
    outcome: Outcome


def parse(text: str) -> dict[str, StageText]:
    """Every stage of ``text`` by name, in the order of the grammar; never raises.

    The text of an unclosed stage runs to the next tag of the grammar or to the end, that of a missing one is empty.
    """
    return {stage.value: _parse_stage(text, stage) for stage in STAGES}


def render(stages: dict[str, str]) -> str:
    """The four stages as one tagged text, as in LLaVA-CoT-100k."""
    return "\n\n".join(f"{stage.open_tag} {stages[stage]} {stage.close_tag}" for stage in STAGES)


def _parse_stage(text: str, stage: Stage) -> StageText:
    _, opened, rest = text.partition(stage.open_tag)
    first, repeated, _ = rest.partition(stage.open_tag)
    body, closed, _ = first.partition(stage.close_tag)
    if not opened:
        return StageText(stage, "", Outcome.MISSING)
    if not closed:
        tags = [tag for other in STAGES for tag in (other.open_tag, other.close_tag)]
        body = body[: min((at for tag in tags if (at := body.find(tag)) >= 0), default=None)]
    outcome = Outcome.REPEATED if repeated else Outcome.COMPLETE if closed else Outcome.UNCLOSED
    return StageText(stage, body.strip(), outcome)
