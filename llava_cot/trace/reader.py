"""Read traces from files: one as JSON, or many as JSON lines, each alone or with an image, a gold answer and an id."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_cot.trace.check import check_references, check_shape
from llava_cot.trace.trace import Trace

SUFFIXES = (".json", ".jsonl")
FIELDS = ("trace", "image", "gold", "id")


class TraceError(ValueError):
    """A trace that can't be read. ``source`` says where it is, and ``detail`` what is wrong with it."""

    def __init__(self, source: str, detail: str) -> None:
        super().__init__(source, detail)
        self.source, self.detail = source, detail

    def __str__(self) -> str:
        return f"{self.source}: {self.detail}"


@dataclass(frozen=True)
class Record:
    """A trace from a file, and what is stored beside it."""

    trace: Trace
    source: str  # the file's name and, in a .jsonl file, the line
    image: str | None = None  # a name for the image, such as the path of its file
    gold: str | None = None  # the right answer
    id: str | None = None


def parse_trace(data: Mapping[str, Any] | str | bytes) -> Trace:
    """Return the trace that ``trace.to_json()`` wrote. ``data`` is the JSON, or what it was loaded into.

    Raises:
        ValueError: ``data`` is no trace of this version. The message names the field.
    """
    if isinstance(data, str | bytes):
        data = _load(data)
    trace = Trace(check_shape(data))
    check_references(trace)
    return trace


def holds_many(path: Path | str) -> bool:
    """Return whether ``path`` is read as many traces, being a folder or a .jsonl file. Any other file is one trace."""
    path = Path(path)
    return path.is_dir() or path.suffix.lower() == ".jsonl"


def scan_traces(path: Path | str) -> Iterator[Record | TraceError]:
    """Yield the traces of a file, or of a folder's .json and .jsonl files in the order of their names.

    A .jsonl file has one trace per line; any other file is one trace. Each is a trace alone or an object ``{"trace":
    {...}, "image": "path", "gold": "4", "id": "..."}``, of which only ``trace`` is required. A trace that can't be read
    yields an error in its place, so that the others can still be used. One trace is in memory at a time.

    Raises:
        OSError: ``path`` itself can't be opened.
    """
    path = Path(path)
    if not path.is_dir():
        yield from _records(path)
        return
    for file in sorted(path.iterdir()):
        if file.suffix.lower() in SUFFIXES:
            try:
                yield from _records(file)
            except OSError as error:
                yield TraceError(file.name, str(error))


def read_traces(path: Path | str) -> Iterator[Record]:
    """Yield what ``scan_traces`` yields, but raise ``TraceError`` at the first trace that can't be read."""
    for found in scan_traces(path):
        if isinstance(found, TraceError):
            raise found
        yield found


def read_trace(path: Path | str) -> Record:
    """Read the one trace of a JSON file. Raises ``TraceError`` or ``OSError`` if it can't be read."""
    path = Path(path)
    found = _record(path.read_bytes(), path.name)
    if isinstance(found, TraceError):
        raise found
    return found


def _records(file: Path) -> Iterator[Record | TraceError]:
    if not holds_many(file):
        yield _record(file.read_bytes(), file.name)
        return
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield _record(line.rstrip(), f"{file.name}, line {number}")


def _record(content: bytes, source: str) -> Record | TraceError:
    try:
        data = _load(content)
        if isinstance(data, dict) and "trace" in data:
            beside = _beside(data)
            return Record(parse_trace(data["trace"]), source, **beside)
        return Record(parse_trace(data), source)
    except ValueError as error:
        return TraceError(source, str(error))


def _beside(data: dict[str, Any]) -> dict[str, str]:
    """Return the fields beside a trace that have a value."""
    found = {}
    for name, value in data.items():
        if name not in FIELDS:
            raise ValueError(f"fields must be {', '.join(FIELDS)}, got {name!r}")
        if name == "trace" or value is None:
            continue
        is_number = name == "gold" and isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number and not isinstance(value, str):
            kinds = "a string or a number" if name == "gold" else "a string"
            raise ValueError(f"{name} must be {kinds}, got {type(value).__name__}")
        found[name] = str(value)
    return found


def _load(content: str | bytes) -> Any:
    try:
        return json.loads(content)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        raise ValueError(f"not JSON, {place}: {error.msg}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"not JSON: {error}") from None
    except RecursionError:
        raise ValueError("not JSON that can be read: it is nested too deeply") from None
