"""The answer that a search returns."""

from dataclasses import dataclass

from llava_cot.core import Usage
from llava_cot.stages import LLAVA_COT, Grammar, StageText
from llava_cot.trace import Trace


@dataclass(frozen=True)
class Answer:
    """The answer of a search. ``stages`` has every stage of ``grammar`` by name, with its ``text`` and ``outcome``."""

    text: str  # everything that was generated, tags included; between replies stand the user's turns, see ``asked``
    tokens: list[int]  # those that were generated
    stages: dict[str, StageText]
    trace: Trace
    usage: Usage
    grammar: Grammar = LLAVA_COT
    violation: str | None = None  # where the text leaves the grammar, in words; None if it does not
    ended: bool = True  # by itself; else it was cut, by a limit or a budget

    @property
    def conclusion(self) -> str:
        """The stripped text of the grammar's conclusion; empty if the model wrote none."""
        return self.stages[self.grammar.conclusion].text


@dataclass(frozen=True)
class Finished:
    """The last event of a stream."""

    answer: Answer
