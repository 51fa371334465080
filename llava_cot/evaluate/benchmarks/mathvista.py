"""MathVista: questions with options, and open ones whose answer is a number, a list or a text."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast, get_args

from llava_cot.evaluate.files.cells import choice_of, decimal_places, lettered, list_of, needed, text
from llava_cot.evaluate.files.file_benchmark import FileBenchmark
from llava_cot.evaluate.files.table import Row
from llava_cot.evaluate.question import AnswerType, Question

# What the file asks: an instruction, the question with its unit, and the options.
QUERY = re.compile(r"(?:Hint: .*?\n)?Question: (?P<question>.*?)(?:\nChoices:\n\(A\).*)?", re.DOTALL)


class MathVista(FileBenchmark):
    """MathVista (arXiv 2310.02255), testmini. Skills are metrics of their own, as in VLMEvalKit.

    ``Question.text`` is the bare question. ``fields["query"]`` is the text that the file asks, with an instruction and
    the options: VLMEvalKit's column ``question``, Hugging Face's column ``query``.
    """

    name = "mathvista"
    title = "MathVista"
    published_rows = (1000,)
    layouts: ClassVar = {
        "VLMEvalKit TSV": ("index", "question", "answer", "question_type", "answer_type", "choices"),
        "Hugging Face": ("pid", "question", "query", "answer", "question_type", "answer_type", "choices"),
    }

    def read(self, row: Row, number: int) -> Question:
        query = needed(row, "query", "question")
        asked = QUERY.fullmatch(query.strip())
        choices = lettered(list_of(row.get("choices"), "choices"))
        answer_type = needed(row, "answer_type")
        if answer_type not in get_args(AnswerType):
            raise ValueError(f"answer_type must be one of {list(get_args(AnswerType))}, got {answer_type!r:.80}")
        metadata = row.get("metadata")
        details = {**(metadata if isinstance(metadata, Mapping) else {}), **row}
        is_choice = needed(row, "question_type") == "multi_choice"
        id = needed(row, "index", "pid")
        return Question(
            id,
            "choice" if is_choice else "open",
            asked["question"] if asked else needed(row, "question"),
            _letter(row, choices) if is_choice else needed(row, "answer"),
            choices,
            group=id,
            category=tuple(filter(None, [text(details, "task")])),
            answer_type=cast(AnswerType, answer_type),
            unit=text(row, "unit"),
            precision=decimal_places(row),
            fields={"query": query, "skills": _skills(details.get("skills"))},
        )

    def tally(self, questions: Sequence[Question], scores: Sequence[float]) -> Mapping[str, tuple[float, float]]:
        sums = {"accuracy": (sum(scores), float(len(scores)))}
        for question, score in zip(questions, scores):
            for skill in question.fields["skills"]:
                total, count = sums.get(skill, (0.0, 0.0))
                sums[skill] = (total + score, count + 1)
        return sums


def _skills(value: Any) -> list[str]:
    """The TSV has a list, or the name of one skill."""
    if isinstance(value, str) and value and not value.startswith("["):
        return [value]
    return [str(skill) for skill in list_of(value, "skills")]


def _letter(row: Row, choices: Mapping[str, str]) -> str:
    """The letter of the right choice. The TSV names it; Hugging Face's file has the text of the choice."""
    letter = text(row, "answer_option")
    if letter is not None:
        return choice_of(letter, choices)
    answer = needed(row, "answer")
    found = [letter for letter, choice in choices.items() if choice == answer]
    if not found:
        raise ValueError(f"its answer must be one of its choices {list(choices.values())}, got {answer!r:.80}")
    return found[0]
