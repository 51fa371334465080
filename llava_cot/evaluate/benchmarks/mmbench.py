"""MMBench: every question is asked once for each rotation of its options."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from llava_cot.evaluate.files.cells import choice_of, needed, options_of, text, whole_number
from llava_cot.evaluate.files.file_benchmark import FileBenchmark
from llava_cot.evaluate.files.table import Row
from llava_cot.evaluate.question import Question

ROTATION = 1_000_000  # added to a question's index for each rotation of its options


class MMBench(FileBenchmark):
    """MMBench in English (arXiv 2307.06281), v1.0 or v1.1, dev or test.

    The headline is circular accuracy: a question counts if every rotation of it is right. ``accuracy`` counts each
    rotation for itself.
    """

    name = "mmbench"
    title = "MMBench"
    headline = "circular_accuracy"
    is_grouped = True
    published_rows = (4329, 6666)  # v1.0 dev and test; v1.1 is known by its md5 alone
    layouts: ClassVar = {"VLMEvalKit TSV or Hugging Face": ("index", "question", "A", "B", "answer")}

    def __init__(self, path: Path | str | None, *, allow_partial: bool = False) -> None:
        self._rotations: dict[str, set[int]] = {}
        self._needed: dict[str, int] = {}  # how many rotations a question has, by its group
        super().__init__(path, allow_partial=allow_partial)

    def read(self, row: Row, number: int) -> Question:
        id = needed(row, "index")
        rotation, group = divmod(whole_number(id, "index"), ROTATION)
        choices = options_of(row)
        answer = choice_of(needed(row, "answer"), choices)
        category = text(row, "l2-category", "L2-category"), text(row, "category")
        return Question(
            id,
            "choice",
            needed(row, "question"),
            answer,
            choices,
            hint=text(row, "hint"),
            group=str(group),
            category=tuple(filter(None, category)),
            fields={"rotation": rotation},
        )

    def visit(self, question: Question) -> None:
        group = question.group
        self._rotations.setdefault(group, set()).add(question.fields["rotation"])
        self._needed[group] = max(self._needed.get(group, 0), len(question.choices))

    def check(self) -> None:
        for group, found in self._rotations.items():
            missing = sorted(set(range(max(self._needed[group], max(found) + 1))) - found)
            if missing:
                rows = [int(group) + ROTATION * rotation for rotation in missing]
                raise ValueError(
                    f"{self._table.path}: question {group} must have a row for each rotation of its "
                    f"{self._needed[group]} options; it lacks the indices {rows[:8]}"
                )

    def tally(self, questions: Sequence[Question], scores: Sequence[float]) -> Mapping[str, tuple[float, float]]:
        return {
            "circular_accuracy": (float(all(score >= 1 for score in scores)), 1),
            "accuracy": (sum(scores), len(scores)),
        }
