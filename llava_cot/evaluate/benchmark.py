"""What every benchmark has in common: a file of questions, prompts, verdicts and metrics. No torch."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from llava_cot.evaluate.presets import prompt_of
from llava_cot.evaluate.question import Question, Verdict
from llava_cot.evaluate.rules import judge

if TYPE_CHECKING:
    from llava_cot.image import ImageLike


@dataclass(frozen=True)
class Dataset:
    """The file that a benchmark was read from.

    Attributes:
        path: None if the questions are made and not read.
        md5: of the file, in hex; of made questions, what says how they were made.
        variant: the published name of a file whose md5 is known, such as "AI2D_TEST_NO_MASK"; else None.
        rows: how many the file has, counted as the published size is.
        expected_rows: how many were published at least; None if that is not known.
        note: what a reader of the result has to know about the file, in full sentences; often nothing.
    """

    path: str | None
    md5: str
    variant: str | None
    rows: int
    expected_rows: int | None = None
    note: str = ""

    @property
    def is_partial(self) -> bool:
        """Whether the file has fewer rows than were published."""
        return self.expected_rows is not None and self.rows < self.expected_rows


class Benchmark(ABC):
    """A benchmark that is read from one file. A subclass is one benchmark; an instance has opened a file of it.

    The constructor reads the file once, checks every row, and raises a ``ValueError`` that names the file, the row and
    what is wrong. Images are not opened. Afterwards rows are read again as they are asked for, so that memory does not
    grow with the file.
    """

    name: ClassVar[str]  # on the command line
    title: ClassVar[str]  # in reports
    headline: ClassVar[str] = "accuracy"  # the metric that is published as the benchmark's number
    default_preset: ClassVar[str] = "vlmevalkit"
    default_rules: ClassVar[str] = "compat"
    own_rules: ClassVar[str | None] = None  # the only rules there are, for a benchmark that judges by itself
    is_grouped: ClassVar[bool] = False  # whether a group may have several questions, which are asked together

    dataset: Dataset

    @abstractmethod
    def __init__(self, path: Path | str | None, *, allow_partial: bool = False) -> None: ...

    @abstractmethod
    def __len__(self) -> int:
        """How many questions there are."""

    @abstractmethod
    def question(self, number: int) -> Question:
        """The question of row ``number``, counted from 0."""

    def number_of(self, id: str) -> int:
        """The row whose question has this id.

        Raises:
            KeyError: there is none.
        """
        for number in range(len(self)):
            if self.question(number).id == id:
                return number
        raise KeyError(id)

    @abstractmethod
    def images(self, number: int) -> "tuple[ImageLike, ...]":
        """The images of row ``number``, as ``llava_cot.image.open_image`` takes them: bytes or paths, not opened."""

    def prompt(self, question: Question, preset: str) -> str:
        """The text that a model is asked, by the name of a prompt preset.

        Raises:
            ValueError: there is no such preset for this benchmark.
        """
        return prompt_of(self.name, question, preset)

    def verdict(self, question: Question, answer: str, rules: str) -> Verdict:
        """The verdict of a rule set on an answer: the conclusion that was extracted from what a model wrote.

        Raises:
            ValueError: there is no such rule set.
        """
        return judge(question, answer, rules)

    def tally(self, questions: Sequence[Question], scores: Sequence[float]) -> Mapping[str, tuple[float, float]]:
        """The part of one group in each metric: what it adds to the numerator and to the denominator.

        A metric is the sum of the first over the sum of the second, over all groups.

        Args:
            questions: those of one ``Question.group``.
            scores: of their answers, in [0, 1].
        """
        return {"accuracy": (sum(scores), len(scores))}

    def derive(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """All metrics, given those of ``tally``. A benchmark adds those that are made of others, such as a mean."""
        return dict(metrics)
