"""Read the rows of any VQA jsonl as conversations with standard answers."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llava_cot.data.conversations import Conversation, Turn, parse_conversation
from llava_cot.data.rows import naming_row, parsed_rows

PLACEHOLDER = "<image>"  # in questions of other data sets; here images come before the first question


@dataclass(frozen=True)
class Question:
    """A conversation to annotate. The answer of each turn is the standard answer."""

    row: Mapping[str, Any]  # the row as it was read; id and image are written unchanged
    conversation: Conversation
    hints: str  # hints for the first turn; may be empty

    @property
    def id(self) -> str:
        return self.conversation.id


def read_questions(path: Path | str) -> Iterator[Question]:
    """Read rows with ``{"id", "image", "question", "answer"}`` and optional ``hints``, or rows of LLaVA-CoT-100k.

    Raises:
        ValueError: a row is not JSON, a field is missing or malformed, or an id occurs twice. The message names the
            file, the row and the field.
    """
    seen: dict[str, int] = {}
    for number, row in parsed_rows(path):
        with naming_row(path, number):
            question = _parse(row)
            if question.id in seen:
                raise ValueError(f"id must be unique, got {question.id!r} again after row {seen[question.id]}")
        seen[question.id] = number
        yield question


def _parse(row: Any) -> Question:
    if not isinstance(row, dict):
        raise ValueError(f"row must be an object, got {type(row).__name__}")
    if "conversations" not in row:
        for name in ("question", "answer"):
            if not isinstance(row.get(name), str | int | float) or not str(row[name]).strip():
                raise ValueError(f"{name} must be a non-empty string, got {row.get(name)!r}")
        talk = [{"from": "human", "value": str(row["question"])}, {"from": "gpt", "value": str(row["answer"])}]
        conversation = parse_conversation({**row, "conversations": talk})
    else:
        conversation = parse_conversation(row)
    turns = tuple(Turn(turn.question.replace(PLACEHOLDER, "").strip(), turn.answer) for turn in conversation.turns)
    if not all(turn.question for turn in turns):
        raise ValueError(f"question must have text beside {PLACEHOLDER}, got none")
    conversation = replace(conversation, turns=turns)
    hints = row.get("hints") or ""
    if not isinstance(hints, str):
        raise ValueError(f"hints must be a string, got {hints!r}")
    return Question(row, conversation, hints.strip())
