"""Traces from files, one at a time."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llava_cot.report.summary import Entry

SUFFIXES = ".json", ".jsonl"


def holds_many(path: Path) -> bool:
    return path.is_dir() or path.suffix.lower() == ".jsonl"


def read_entry(path: Path) -> Entry:
    """The one trace of a JSON file.

    Raises:
        ValueError, OSError: what is wrong with it, without its name.
    """
    return _entry(path.read_bytes(), path.name)


def entries(path: Path) -> Iterator[Entry]:
    """The traces of a folder's .json and .jsonl files in the order of their names, or of one .jsonl file line by line.

    What can't be read is an entry too, which says why.
    """
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        if file.suffix.lower() == ".jsonl":
            yield from _lines(file)
        elif file.suffix.lower() in SUFFIXES:
            try:
                yield read_entry(file)
            except (ValueError, OSError) as error:
                yield Entry(None, source=file.name, error=str(error))


def _lines(file: Path) -> Iterator[Entry]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                source = f"{file.name}, line {number}"
                try:
                    yield _entry(line.rstrip(), source)
                except json.JSONDecodeError as error:
                    yield Entry(None, source=source, error=f"not JSON, column {error.colno}: {error.msg}")
                except ValueError as error:
                    yield Entry(None, source=source, error=str(error))


def _entry(content: bytes, source: str) -> Entry:
    """A trace, or an object that has one as "trace" and may have the right answer as "gold"."""
    try:
        data = json.loads(content)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    gold: Any = None
    if isinstance(data, dict) and "trace" in data:
        data, gold = data["trace"], data.get("gold")
    if not isinstance(data, dict):
        raise ValueError(f"trace must be an object, got {type(data).__name__}")
    if gold is not None and (isinstance(gold, bool) or not isinstance(gold, str | int | float)):
        raise ValueError(f"gold must be a string or a number, got {type(gold).__name__}")
    return Entry(data, None if gold is None else str(gold), source=source)
