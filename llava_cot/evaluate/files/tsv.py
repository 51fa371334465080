"""Tab-separated files as pandas writes them: cells may be quoted and hold tabs, line ends and doubled quotes."""

import csv
from array import array
from collections.abc import Collection, Iterator
from hashlib import md5
from pathlib import Path

from llava_cot.evaluate.files.lines import Lines
from llava_cot.evaluate.files.table import Row, Table

# A cell with an image in base64 has megabytes. What is larger than this is a quote that was never closed.
LARGEST_CELL = 1 << 28  # characters


class Tsv(Table):
    """A tab-separated file whose first record names the columns. Blank lines are skipped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offsets = array("q")  # of the byte that each row starts at
        with open(path, "rb") as file:
            try:
                self.columns = tuple(next(_records(Lines(file))))
            except (csv.Error, ValueError) as error:
                raise ValueError(f"{path}: its header can't be read: {error}") from None
        twice = sorted({name for name in self.columns if self.columns.count(name) > 1})
        if twice:
            raise ValueError(f"{path}: its columns must have different names, and {twice} are there more than once")

    def scan(self) -> Iterator[Row]:
        self._offsets = array("q")
        self._begin([self.path])
        digest = md5(usedforsecurity=False)
        with open(self.path, "rb") as file:
            lines = Lines(file, digest)
            records = _records(lines)
            next(records)
            while True:
                start = lines.offset
                cells = self._next(records)
                if cells is None:
                    break
                if cells:
                    self._offsets.append(start)
                    yield dict(zip(self.columns, cells))
        self.md5 = digest.hexdigest()

    def _next(self, records: Iterator[list[str]]) -> list[str] | None:
        """The cells of the next record; none of a blank line, and None at the end."""
        try:
            cells = next(records, None)
        except csv.Error as error:
            raise self.error(len(self), f"a quoted cell is not closed: {error}") from None
        except ValueError as error:
            raise self.error(len(self), error) from None
        if cells and len(cells) != len(self.columns):
            reason = f"it has {len(cells)} cells and the header has {len(self.columns)}; is the file truncated?"
            raise self.error(len(self), reason)
        return cells

    def __len__(self) -> int:
        return len(self._offsets)

    def row(self, number: int, columns: Collection[str] | None = None) -> Row:
        with self._as_scanned(), open(self.path, "rb") as file:
            file.seek(self._offsets[number])
            return dict(zip(self.columns, next(_records(Lines(file)))))


def _records(lines: Lines) -> Iterator[list[str]]:
    csv.field_size_limit(LARGEST_CELL)
    return csv.reader(lines, delimiter="\t", strict=True)
