"""A question of a benchmark, and what a scoring rule says about an answer to it. No torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["choice", "yes_no", "open", "graded"]
AnswerType = Literal["text", "integer", "float", "list"]


@dataclass(frozen=True)
class Question:
    """A row of a benchmark without its images, as far as prompts, rules and metrics need it.

    Attributes:
        id: unique in the file, and the same whenever it is read.
        kind: what an answer looks like: the letter or text of a choice, yes or no, free text with one right answer, or
            free text that a judge grades.
        answer: the right answer: the letter of a choice, "Yes" or "No", or a text.
        choices: the options by letter, in order; empty unless there are some. MathVista has open questions with
            choices: theirs are named A, B, ... in order.
        group: what belongs together and is resampled together, such as the rotations of one MMBench question.
        category: what accuracy is also reported by, from coarse to fine.
        unit: what the number in the answer counts, if the file says so.
        precision: the decimal places of a number in the answer, if the file says so.
        fields: the other columns that a metric of this benchmark reads.
    """

    id: str
    kind: Kind
    text: str
    answer: str
    choices: Mapping[str, str] = field(default_factory=dict)
    hint: str | None = None
    group: str = ""
    category: tuple[str, ...] = ()
    answer_type: AnswerType = "text"
    unit: str | None = None
    precision: int | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)

    @property
    def letter(self) -> str | None:
        """The letter of the right option, whether ``answer`` is that or its text; None if it is no option's."""
        if self.answer in self.choices:
            return self.answer
        return next((letter for letter, text in self.choices.items() if text == self.answer), None)


@dataclass(frozen=True)
class Verdict:
    """What a rule set says about an answer.

    Attributes:
        score: 1.0 if it is right and 0.0 if it is wrong, or a grade between; None if the rules can't tell, which is
            counted apart from wrong answers.
        extracted: what the rules took as the answer, such as a letter; None if they found none.
        rule: the name of the rule that found it, or why none did.
    """

    score: float | None
    extracted: str | None
    rule: str

    @property
    def correct(self) -> bool | None:
        """Whether the answer is wholly right; None if the rules can't tell."""
        return None if self.score is None else self.score >= 1.0
