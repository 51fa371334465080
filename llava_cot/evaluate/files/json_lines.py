"""JSON-lines files: one object per line."""

import json
from array import array
from collections.abc import Collection, Iterator
from hashlib import md5
from pathlib import Path
from typing import Any

from llava_cot.evaluate.files.lines import Lines
from llava_cot.evaluate.files.table import Row, Table


class JsonLines(Table):
    """A file with one JSON object per line. Blank lines are skipped; the columns are the keys of the first object."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offsets = array("q")  # of the byte that each row starts at
        self.columns = tuple(next(self.scan(), {}))

    def scan(self) -> Iterator[Row]:
        self._offsets = array("q")
        self._begin([self.path])
        digest = md5(usedforsecurity=False)
        with open(self.path, "rb") as file:
            lines = Lines(file, digest)
            while True:
                start = lines.offset
                try:
                    line = next(lines, None)
                    if line is None:
                        break
                    if not line.strip():
                        continue
                    row = _object(line)
                except ValueError as error:
                    raise self.error(len(self), error) from None
                self._offsets.append(start)
                yield row
        self.md5 = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._offsets)

    def row(self, number: int, columns: Collection[str] | None = None) -> Row:
        with self._as_scanned(), open(self.path, "rb") as file:
            file.seek(self._offsets[number])
            return _object(next(Lines(file)))


def _object(line: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its line must be a JSON object: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"its line must be a JSON object, got {line.strip()[:40]!r}")
    if "\\u" in line and any("\ud800" <= character <= "\udfff" for character in json.dumps(found, ensure_ascii=False)):
        raise ValueError("its text must be Unicode, and has half of a surrogate pair")
    return found
