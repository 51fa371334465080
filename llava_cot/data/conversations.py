"""Rows in LLaVA-CoT-100k's layout: ``{"id", "image", "conversations": [{"from", "value"}]}``."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_cot.data.rows import naming_row, parsed_rows


@dataclass(frozen=True)
class Turn:
    """A question and its answer, both stripped."""

    question: str
    answer: str


@dataclass(frozen=True)
class Conversation:
    """Turns about images, which come before the first question."""

    id: str
    images: tuple[str, ...]  # paths relative to the image folder; empty for a conversation without images
    turns: tuple[Turn, ...]


def parse_conversation(row: Mapping[str, Any]) -> Conversation:
    """Parse ``row`` as a conversation. Its ``image`` is a path, a list of paths, or absent.

    Raises:
        ValueError: a field is missing, of another type, or empty, or the turns are not human, gpt, human, gpt, ...
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"row must be an object, got {type(row).__name__}")
    name, image, given = row.get("id"), row.get("image"), row.get("conversations")
    if not isinstance(name, str | int) or isinstance(name, bool) or name == "":
        raise ValueError(f"id must be a non-empty string, got {name!r}")
    images = [] if image is None else image if isinstance(image, list) else [image]
    if not all(isinstance(path, str) and path for path in images):
        raise ValueError(f"image must be a path or a list of paths, got {image!r}")
    if not isinstance(given, list) or not given or len(given) % 2:
        got = len(given) if isinstance(given, list) else given
        raise ValueError(f"conversations must be a list of pairs of turns, got {got!r}")
    texts = []
    for index, turn in enumerate(given):
        expected = ("human", "gpt")[index % 2]
        who, value = (turn.get("from"), turn.get("value")) if isinstance(turn, Mapping) else (turn, None)
        if who != expected:
            raise ValueError(f"conversations[{index}] must be from {expected!r}, got {who!r}")
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"conversations[{index}] must have a non-empty value, got {value!r}")
        texts.append(value.strip())
    turns = tuple(Turn(question, answer) for question, answer in zip(texts[::2], texts[1::2]))
    return Conversation(str(name), tuple(images), turns)


def read_conversations(path: Path | str) -> Iterator[tuple[int, Conversation]]:
    """Yield the conversations of a data file with the numbers of their rows. Blank lines are skipped.

    Only one row is in memory at a time.

    Raises:
        ValueError: a row is not JSON or not a conversation; the message names the file, the row and the field.
    """
    for number, row in parsed_rows(path):
        with naming_row(path, number):
            conversation = parse_conversation(row)
        yield number, conversation
