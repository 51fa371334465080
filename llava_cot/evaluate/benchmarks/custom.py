"""Questions of your own, with or without choices and images."""

from collections.abc import Mapping
from string import ascii_uppercase
from typing import Any, ClassVar, cast, get_args

from llava_cot.evaluate.files.cells import decimal_places, lettered, list_of, needed, options_of, text
from llava_cot.evaluate.files.file_benchmark import FileBenchmark
from llava_cot.evaluate.files.table import Row
from llava_cot.evaluate.question import AnswerType, Question


class Custom(FileBenchmark):
    """A file with one question per row, such as ScienceQA's: JSON lines, a TSV or parquet.

    The columns ``question`` and ``answer`` are needed. Choices are a list or a mapping from letters in ``choices``, or
    texts in the columns ``A``, ``B``, ... The answer is then a letter, the text of a choice, or the place of a choice
    from 0 on, which must be a number and not text. Images are base64, or paths that are relative to the file, in
    ``image``, ``images`` or ``image_path``. ``id`` is the row's number where it is missing. ``hint``, ``category``,
    ``answer_type``, ``unit`` and ``precision`` may be there too.
    """

    name = "custom"
    title = "Custom questions"
    default_preset = "plain"
    default_rules = "strict"
    layouts: ClassVar = {"one question per row": ("question", "answer")}

    def read(self, row: Row, number: int) -> Question:
        id = text(row, "id", "index", "question_id", "pid") or str(number)
        choices = _choices(row)
        answer = _choice(row, choices) if choices else needed(row, "answer")
        is_yes_no = not choices and answer.strip().lower() in ("yes", "no")
        answer_type = text(row, "answer_type") or "text"
        if answer_type not in get_args(AnswerType):
            raise ValueError(f"answer_type must be one of {list(get_args(AnswerType))}, got {answer_type!r:.80}")
        return Question(
            id,
            "choice" if choices else "yes_no" if is_yes_no else "open",
            needed(row, "question"),
            answer.strip().capitalize() if is_yes_no else answer,
            choices,
            hint=text(row, "hint"),
            group=id,
            category=tuple(filter(None, [text(row, "category")])),
            answer_type=cast(AnswerType, answer_type),
            unit=text(row, "unit"),
            precision=decimal_places(row),
        )

    def needs_image(self, question: Question) -> bool:
        return False


def _choices(row: Row) -> dict[str, str]:
    value: Any = row.get("choices")
    if isinstance(value, Mapping):
        found = {str(letter): str(option) for letter, option in value.items() if option is not None}
        if not set(found) <= set(ascii_uppercase):
            raise ValueError(f"its choices must be named by capital letters, got {list(found)!r:.80}")
        return found
    return lettered(list_of(value, "choices")) or options_of(row)


def _choice(row: Row, choices: Mapping[str, str]) -> str:
    """The letter of the right choice, whichever way the answer names it."""
    answer = row.get("answer")
    if isinstance(answer, (int, float)) and not isinstance(answer, bool) and answer == answer:
        if answer not in range(len(choices)):
            raise ValueError(f"its answer must be the place of a choice, from 0 to {len(choices) - 1}, got {answer}")
        return list(choices)[int(answer)]
    written = needed(row, "answer").strip()
    found = {letter for letter, option in choices.items() if written in (letter, option.strip())}
    if len(found) != 1:
        wrong = "names none of them" if not found else f"may be any of {sorted(found)}"
        raise ValueError(f"its answer must name one of its choices {dict(choices)}, and {written!r:.80} {wrong}")
    return found.pop()
