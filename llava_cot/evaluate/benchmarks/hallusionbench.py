"""HallusionBench: yes-or-no questions, each asked about several versions of a figure."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import ClassVar

from llava_cot.evaluate.files.cells import needed, text, whole_number
from llava_cot.evaluate.files.file_benchmark import FileBenchmark
from llava_cot.evaluate.files.table import Row
from llava_cot.evaluate.question import Question

ANSWERS = {"yes": "Yes", "1": "Yes", "no": "No", "0": "No"}
PARTS = ("category", "subcategory", "visual_input", "set_id", "figure_id", "question_id")  # of an index
PAIR_METRICS = ("aAcc", "fAcc", "qAcc")


class HallusionBench(FileBenchmark):
    """HallusionBench (arXiv 2310.14566) as VLMEvalKit measures it (``Hallusion_rating`` at e8e78f05).

    ``aAcc`` is the accuracy of all questions. ``fAcc`` counts the figures all of whose questions are right. ``qAcc``
    counts the questions that are right about every figure of their set. The headline is the mean of the three. A figure
    is named by subcategory, set and figure, and a question by subcategory, set and question: VLMEvalKit does not look
    at the category, so that sets of VD and VS with one subcategory (ocr) and number are one. That leaves 332 of the 346
    figures and 429 of the 455 questions that the published questions have.

    VLMEvalKit leaves out the 178 questions that are asked without an image. If the file has them they are asked, and
    are only in ``aAcc_without_image``.
    """

    name = "hallusionbench"
    title = "HallusionBench"
    headline = "mean"
    is_grouped = True
    published_rows = (951,)  # with an image, of 1,129
    layouts: ClassVar = {
        "VLMEvalKit TSV": ("index", "question", "answer", "l2-category"),
        "Hugging Face": (*PARTS, "question", "gt_answer"),
    }

    def __init__(self, path: Path | str | None, *, allow_partial: bool = False) -> None:
        self._cells: dict[tuple[str, str, str], set[tuple[int, int]]] = defaultdict(set)
        self._without_image = 0
        super().__init__(path, allow_partial=allow_partial)

    def read(self, row: Row, number: int) -> Question:
        parts = [needed(row, name) for name in PARTS] if "index" not in row else needed(row, "index").split("_")
        if len(parts) != len(PARTS):
            raise ValueError(f"its index must be {'_'.join(PARTS)}, got {'_'.join(parts)!r:.80}")
        category, subcategory, visual_input, *place = parts
        set_id, figure, question = (whole_number(part, name) for part, name in zip(place, PARTS[3:]))
        answer = needed(row, "answer", "gt_answer")
        if answer.strip().lower() not in ANSWERS:
            raise ValueError(f"its answer must be yes or no, or 1 or 0, got {answer!r:.80}")
        subcategory = text(row, "l2-category", "subcategory") or subcategory
        return Question(
            "_".join(parts),
            "yes_no",
            needed(row, "question"),
            ANSWERS[answer.strip().lower()],
            group=f"{subcategory}_{set_id}",
            category=(text(row, "category") or category, subcategory),
            fields={"set": set_id, "figure": figure, "question": question, "has_image": visual_input != "0"},
        )

    def needs_image(self, question: Question) -> bool:
        return bool(question.fields["has_image"])

    def visit(self, question: Question) -> None:
        category, subcategory = question.category
        cell = question.fields["figure"], question.fields["question"]
        self._cells[category, subcategory, question.group].add(cell)
        self._without_image += not question.fields["has_image"]

    def counted(self) -> int:
        return len(self) - self._without_image

    def check(self) -> None:
        """Check that each question of a set is asked about each of its figures. In VS figure 0 has no image."""
        if not self.counted():
            raise ValueError(f"{self._table.path}: it has no question with an image, and all metrics count these alone")
        for (category, _, group), cells in self._cells.items():
            figures, questions = ({cell[axis] for cell in cells} for axis in (0, 1))
            first = 0 if category == "VD" else min(1, min(figures))
            whole = product(range(first, max(figures) + 1), range(max(questions) + 1))
            for figure, question in whole:
                if (figure, question) not in cells:
                    raise ValueError(
                        f"{self._table.path}: every question of a set must be asked about every figure of it; "
                        f"{category}, set {group}, lacks question {question} about figure {figure}"
                    )

    def notes(self) -> tuple[str, ...]:
        if not self._without_image:
            return ()
        return (
            f"Questions without an image: {self._without_image}. They count in aAcc_without_image alone, "
            "since VLMEvalKit leaves them out.",
        )

    def tally(self, questions: Sequence[Question], scores: Sequence[float]) -> Mapping[str, tuple[float, float]]:
        seen: list[float] = []
        blind: list[float] = []
        figures: dict[int, list[bool]] = defaultdict(list)
        asked: dict[int, list[bool]] = defaultdict(list)
        for question, score in zip(questions, scores):
            if not question.fields["has_image"]:
                blind.append(score)
                continue
            seen.append(score)
            figures[question.fields["figure"]].append(score >= 1)
            asked[question.fields["question"]].append(score >= 1)
        sums: dict[str, tuple[float, float]] = {
            "aAcc": (sum(seen), len(seen)),
            "fAcc": (sum(map(all, figures.values())), len(figures)),
            "qAcc": (sum(map(all, asked.values())), len(asked)),
        }
        return sums | ({"aAcc_without_image": (sum(blind), len(blind))} if blind else {})

    def derive(self, metrics: Mapping[str, float]) -> dict[str, float]:
        return dict(metrics) | {"mean": sum(metrics[name] for name in PAIR_METRICS) / len(PAIR_METRICS)}
