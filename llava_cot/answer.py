"""What a search returns."""

from dataclasses import dataclass

from llava_cot.core import Usage
from llava_cot.stages import LLAVA_COT, Grammar, StageText
from llava_cot.trace import Trace


@dataclass(frozen=True)
class Answer:
    """``stages`` has every stage of ``grammar`` by name, each with its ``text`` and its ``outcome``."""

    text: str  # everything that was generated, tags included
    tokens: list[int]
    stages: dict[str, StageText]
    trace: Trace
    usage: Usage
    grammar: Grammar = LLAVA_COT
    violation: str | None = None  # where the text leaves the grammar, in words

    @property
    def conclusion(self) -> str:
        """The stripped text of the last stage, CONCLUSION; empty if the model wrote none."""
        return self.stages[self.grammar.conclusion].text


@dataclass(frozen=True)
class Finished:
    """The last event of a stream."""

    answer: Answer
