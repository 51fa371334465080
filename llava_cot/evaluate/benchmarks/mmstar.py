"""MMStar: 1,500 questions with four options, in 6 categories and 18 subcategories."""

import re
from typing import ClassVar

from llava_cot.evaluate.files.cells import choice_of, needed, options_of, text
from llava_cot.evaluate.files.file_benchmark import FileBenchmark
from llava_cot.evaluate.files.table import Row
from llava_cot.evaluate.question import Question

OPTIONS = re.compile(r"(?:Options|Choices)\s*:\s*\(?A([:.)])\s*")
LETTERS = {letter: letter for letter in "ABCD"}  # in place of options that could not be told from the text


class MMStar(FileBenchmark):
    """MMStar (arXiv 2403.20330).

    VLMEvalKit's TSV has a column for each option. Hugging Face's file has them in the question. The published number is
    the mean over all questions, which VLMEvalKit reports.
    """

    name = "mmstar"
    title = "MMStar"
    published_rows = (1500,)
    layouts: ClassVar = {
        "VLMEvalKit TSV": ("index", "question", "A", "B", "C", "D", "answer"),
        "Hugging Face": ("index", "question", "answer", "category", "l2_category", "meta_info"),
    }
    _unread = 0

    def read(self, row: Row, number: int) -> Question:
        id, question = needed(row, "index"), needed(row, "question")
        choices = options_of(row)
        fields = {}
        if not choices and (parts := split_options(question)):
            question, choices = parts
        elif not choices:
            choices, fields = LETTERS, {"options_in_text": True}
        answer = choice_of(needed(row, "answer"), choices)
        category = text(row, "category"), text(row, "l2_category", "l2-category")
        return Question(
            id, "choice", question, answer, choices, group=id, category=tuple(filter(None, category)), fields=fields
        )

    def visit(self, question: Question) -> None:
        self._unread += "options_in_text" in question.fields

    def notes(self) -> tuple[str, ...]:
        if not self._unread:
            return ()
        return (f"Questions whose options could not be told from their text: {self._unread}.",)


def split_options(question: str) -> tuple[str, dict[str, str]] | None:
    """Split "...? Options: A: one, B: two" into the question and its options, or return None if it does not end so.

    An option may hold commas, colons and line ends. The next one begins where its letter follows a comma, a semicolon
    or a line end; if no letter does, where it follows white space.
    """
    heads = list(OPTIONS.finditer(question))
    if not heads:
        return None
    head, mark = heads[-1], re.escape(heads[-1][1])
    for separator in (r"[,;\n][ \t]*", r"\s"):
        choices, rest, letter = {}, question[head.end() :], "A"
        while True:
            following = chr(ord(letter) + 1)
            parts = re.split(rf"{separator}\(?{re.escape(following)}{mark}\s*", rest, maxsplit=1)
            choices[letter] = parts[0].strip()
            if len(parts) == 1:
                break
            letter, rest = following, parts[1]
        if len(choices) > 1:
            return question[: head.start()].rstrip(), choices
    return None
