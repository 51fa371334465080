"""AI2D: questions about diagrams, as two benchmarks. The labels in the diagrams are masked by letters, or not."""

from typing import ClassVar

from llava_cot.evaluate.files.cells import choice_of, lettered, list_of, needed, options_of, text, whole_number
from llava_cot.evaluate.files.file_benchmark import FileBenchmark
from llava_cot.evaluate.files.table import Row
from llava_cot.evaluate.question import Question


class AI2D(FileBenchmark):
    """AI2D's test split (arXiv 1603.07396) with masked labels.

    Only the images differ from ``AI2DUnmasked``, which published scores are some 7 points higher on. The two are told
    apart by the md5 of VLMEvalKit's files; of other files ``dataset.note`` says that they can't be.
    """

    name = "ai2d"
    title = "AI2D (masked labels)"
    published_rows = (3088,)
    layouts: ClassVar = {
        "VLMEvalKit TSV": ("index", "question", "A", "B", "answer"),
        "Hugging Face": ("question", "options", "answer"),
    }

    def read(self, row: Row, number: int) -> Question:
        id = text(row, "index") or str(number)  # Hugging Face's file has none
        if self.layout == "Hugging Face":
            choices = lettered(list_of(row.get("options"), "options"))
            place = whole_number(needed(row, "answer"), "answer")
            if place >= len(choices):
                raise ValueError(f"its answer must be the place of a choice, below {len(choices)}, got {place}")
            answer = list(choices)[place]
        else:
            choices = options_of(row)
            answer = choice_of(needed(row, "answer"), choices)
        return Question(id, "choice", needed(row, "question"), answer, choices, group=id)

    def notes(self) -> tuple[str, ...]:
        if self.known is not None:
            return ()
        return (f"The md5 of the file is unknown, so that nothing shows whether it is {self.title}.",)


class AI2DUnmasked(AI2D):
    """AI2D's test split with the labels as they were drawn. LLaVA-CoT's model card and training data use it."""

    name = "ai2d_unmasked"
    title = "AI2D (unmasked labels)"
