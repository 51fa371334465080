"""Read the rows of a data file: JSON lines, one JSON array, or a Parquet table.

Every command that takes data reads it here, so what one accepts, the next can read. A row stays the bytes of its JSON
until it is parsed. No type is guessed from other rows, and one bad row spoils no other.
"""

import codecs
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

MAX_ROW = 64 << 20  # bytes; a longer line is not a row, and memory must stay bounded
BLOCK = 1 << 20  # characters of an array that are read at a time
TAIL = 1 << 16  # bytes at the end of a file that tell whether an array ends there
WHITE_SPACE = re.compile(r"[ \t\r\n]*")
SCANNER = json.JSONDecoder()
# The longer mark comes first, since the shorter one is its beginning.
WIDE = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def raw_rows(path: Path | str) -> Iterator[bytes]:
    """Yield the JSON of each row. Of JSON lines these are the lines with their ends, the blank ones included.

    The kind of file is told by its first bytes, whatever its name is. A byte order mark is left out. The rows of an
    array or a table have one line each too, and stand in UTF-8.

    Raises:
        ValueError: the file is in UTF-16 or UTF-32, a row has more than 64 MiB, or the file is an array or a table that
            can't be read. A line that is not JSON is yielded.
        ModuleNotFoundError: the file is a Parquet table, and pyarrow is not installed.
    """
    with open(path, "rb") as file:
        head = file.read(4)
        if wide := next((name for mark, name in WIDE.items() if head.startswith(mark)), None):
            raise ValueError(f"data must be in UTF-8, got {wide} in {str(path)!r}")
        if head == b"PAR1":
            yield from _table_rows(path)
            return
        file.seek(len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0)
        start = file.tell()
        is_array = _is_array(file)
        file.seek(start)
        yield from _array_rows(file, str(path)) if is_array else _lines(file, str(path))


def parse_row(raw: bytes) -> Any:
    """Parse the JSON of a row, strictly: in UTF-8, without NaN, and with no key twice in one object.

    Raises:
        ValueError: it is none. UnicodeDecodeError, which is a ValueError, means that it is not UTF-8.
    """
    try:
        return json.loads(raw.decode("utf-8"), parse_constant=_refuse, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def parsed_rows(path: Path | str) -> Iterator[tuple[int, Any]]:
    """Yield the rows of a file with their numbers, counted from 1. Blank lines are counted and left out.

    Raises:
        ValueError: see ``raw_rows`` and ``parse_row``; the message names the file and the row.
    """
    for number, raw in enumerate(raw_rows(path), 1):
        if raw.strip():
            with naming_row(path, number):
                row = parse_row(raw)
            yield number, row


@contextmanager
def naming_row(path: Path | str, number: int) -> Iterator[None]:
    """Put the file and the number of the row before the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"row {number} of {str(path)!r}: {error}") from None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):  # parsers differ in which one they take
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object must have each key once, got {twice!r} twice")
    return made


def _lines(file: BinaryIO, path: str) -> Iterator[bytes]:
    for number, line in enumerate(iter(partial(file.readline, MAX_ROW + 1), b""), 1):
        if len(line) > MAX_ROW:
            raise ValueError(f"row {number} of {path!r} must have at most {MAX_ROW} bytes, got more")
        yield line


def _is_array(file: BinaryIO) -> bool:
    """Return whether the file is one array, rather than lines of which the first happens to be a list, or a part."""
    lines = (line for line in iter(partial(file.readline, MAX_ROW + 1), b"") if line.strip())
    first = next(lines, b"")
    if not first.lstrip().startswith(b"["):
        return False
    if _is_json(first):
        return next(lines, None) is None
    file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
    last = file.read().rstrip().rpartition(b"\n")[2]
    return last.endswith(b"]") and not _is_json(last)


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
        return True
    except (ValueError, RecursionError):
        return False


def _array_rows(file: BinaryIO, path: str) -> Iterator[bytes]:
    array = _Array(file, path)
    array.at += 1  # the opening bracket
    if array.peek() != "]":
        yield array.value()
        while array.peek() == ",":
            array.at += 1
            yield array.value()
    if (sign := array.peek()) != "]":
        raise ValueError(f"row {array.number} of {path!r} must be followed by ',' or ']', got {sign!r}")
    array.at += 1
    if sign := array.peek():
        raise ValueError(f"data must end with its array, got {sign!r} behind row {array.number} of {path!r}")


class _Array:
    """The text of a file, of which only the value at hand is in memory."""

    def __init__(self, file: BinaryIO, path: str) -> None:
        self._file, self._path = file, path
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")  # keeps bytes that are not UTF-8
        self._text, self._ended = "", False
        self.at, self.number = 0, 0  # the place in the text, and the number of values before it
        self.peek()

    def peek(self) -> str:
        """Skip white space and return the next character, which is empty at the end of the file."""
        while True:
            self.at = WHITE_SPACE.match(self._text, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self._text) or self._ended:
                return self._text[self.at : self.at + 1]
            self._read_on()

    def value(self) -> bytes:
        """Take the JSON value that begins here and return it on one line."""
        self.number += 1
        self.peek()
        while (end := self._end()) is None:
            if len(self._text) - self.at > MAX_ROW:
                raise ValueError(f"row {self.number} of {self._path!r} must have at most {MAX_ROW} bytes, got more")
            self._read_on()
        raw = self._text[self.at : end].encode("utf-8", "surrogateescape")
        self.at = end
        return raw.replace(b"\r", b" ").replace(b"\n", b" ") + b"\n"  # in JSON, no text has a line break

    def _end(self) -> int | None:
        """Return the end of the value, or None if there may be more of it in the file."""
        try:
            _, end = SCANNER.raw_decode(self._text, self.at)
        except RecursionError:
            raise ValueError(f"row {self.number} of {self._path!r}: it is nested too deeply") from None
        except ValueError as error:
            if self._ended:
                raise ValueError(f"row {self.number} of {self._path!r} is not JSON: {error}") from None
            return None
        return end if end < len(self._text) or self._ended else None

    def _read_on(self) -> None:
        """Read as much again as is waiting, so that a long value is not scanned too often."""
        block = self._file.read(max(BLOCK, len(self._text) - self.at))
        self._ended = not block
        self._text, self.at = self._text[self.at :] + self._decoder.decode(block, final=self._ended), 0


def _table_rows(path: Path | str) -> Iterator[bytes]:
    try:
        from pyarrow import ArrowException, parquet
    except ModuleNotFoundError:
        raise ModuleNotFoundError(f"reading {str(path)!r} needs pyarrow; install llava-cot[train]") from None
    try:
        with parquet.ParquetFile(path) as table:
            for batch in table.iter_batches(batch_size=64):
                for row in batch.to_pylist():
                    yield json.dumps(row, ensure_ascii=False, default=_shown).encode("utf-8", "surrogatepass") + b"\n"
    except ArrowException as error:
        raise ValueError(f"data must be a Parquet table, got {str(path)!r}: {error}") from None


def _shown(value: object) -> dict[str, str]:
    """Return what stands for a value that JSON has not, such as a date. It is never taken for a text or a path."""
    text = f"{len(value)} bytes" if isinstance(value, bytes) else str(value)
    return {type(value).__name__: text}
