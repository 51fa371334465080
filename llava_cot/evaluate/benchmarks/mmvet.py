"""MM-Vet: 218 open questions that a judge grades between 0 and 1."""

import re
from collections.abc import Mapping, Sequence
from typing import ClassVar

from llava_cot.evaluate.files.cells import needed
from llava_cot.evaluate.files.file_benchmark import FileBenchmark
from llava_cot.evaluate.files.table import Row
from llava_cot.evaluate.question import Question

CAPABILITIES = ("rec", "ocr", "know", "gen", "spat", "math")


class MMVet(FileBenchmark):
    """MM-Vet (arXiv 2308.02490). No rule can grade it. Each capability is a metric of its own, as in VLMEvalKit."""

    name = "mmvet"
    title = "MM-Vet"
    published_rows = (218,)
    layouts: ClassVar = {
        "VLMEvalKit TSV": ("index", "question", "answer", "category"),
        "Hugging Face": ("question_id", "question", "answer", "capability"),
    }

    def read(self, row: Row, number: int) -> Question:
        id = needed(row, "index", "question_id")
        capabilities = needed(row, "category", "capability")
        names = sorted(name for name in re.split(r"[,_;\s]+", capabilities) if name)
        if not names or not set(names) <= set(CAPABILITIES):
            raise ValueError(f"its capabilities must be among {list(CAPABILITIES)}, got {capabilities!r:.80}")
        return Question(
            id,
            "graded",
            needed(row, "question"),
            needed(row, "answer"),
            group=id,
            category=(",".join(names),),
            fields={"capabilities": names},
        )

    def tally(self, questions: Sequence[Question], scores: Sequence[float]) -> Mapping[str, tuple[float, float]]:
        sums = {"accuracy": (sum(scores), float(len(scores)))}
        for question, score in zip(questions, scores):
            for name in question.fields["capabilities"]:
                total, count = sums.get(name, (0.0, 0.0))
                sums[name] = (total + score, count + 1)
        return sums
