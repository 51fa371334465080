"""Tables: the rows of a benchmark's file, which are read again whenever they are asked for. No torch."""

import os
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

Row: TypeAlias = Mapping[str, Any]  # the cells of a row by column

HEAD = 1 << 16  # bytes of a file that tell its format


class Table(ABC):
    """The rows of a file. A few bytes per row are kept in memory, however much a row holds.

    ``scan`` must be read to its end once; then ``len``, ``row`` and ``md5`` can be used.

    Attributes:
        path: of the file, or of the folder with its shards.
        columns: their names, in the file's order. Rows of JSON lines may have others.
        md5: of the file in hex; of shards, that of their concatenation in the order of their names.
    """

    path: Path
    columns: tuple[str, ...]
    md5: str
    _stamps: Mapping[Path, tuple[int, int]]

    @abstractmethod
    def scan(self) -> Iterator[Row]:
        """Yield the rows in order and learn where each one is.

        Raises:
            ValueError: a row can't be read. The message names the file and the row.
        """

    @abstractmethod
    def __len__(self) -> int:
        """How many rows have been scanned."""

    @abstractmethod
    def row(self, number: int, columns: Collection[str] | None = None) -> Row:
        """Read row ``number``, counted from 0, with at least ``columns`` of it (None: with all).

        Raises:
            OSError: a file has changed since it was scanned, so that the row may be another one or none.
        """

    def _begin(self, files: Iterable[Path]) -> None:
        """Remember what ``files`` are like. A subclass calls it when a scan begins."""
        self._stamps = {file: _stamp(file) for file in files}

    @contextmanager
    def _as_scanned(self) -> Iterator[None]:
        """Raise ``OSError``, whatever else went wrong in the block, if a file has changed since the scan began."""
        try:
            yield
        finally:
            for file, stamp in self._stamps.items():
                if _stamp(file) != stamp:
                    raise OSError(f"{file}: it must stay as it is while it is used, and it was changed or cut")

    def error(self, number: int, reason: object) -> ValueError:
        """The error that names the file, the row and what is wrong with it. In messages the first row is row 1."""
        return ValueError(f"{self.path}: row {number + 1}: {reason}")


def _stamp(file: Path) -> tuple[int, int]:
    """The size and the time of the last change, in whole seconds: some file systems forget the rest of it."""
    found = os.stat(file)
    return found.st_size, int(found.st_mtime)


def open_table(path: Path | str) -> Table:
    """Open a file by its content, whatever it is called: a TSV as VLMEvalKit has them, JSON lines, or parquet.

    A folder is read as the shards of one parquet table, in the order of their names.

    Raises:
        ValueError: there is no such file, it is empty, or it is none of the three.
    """
    from llava_cot.evaluate.files.json_lines import JsonLines
    from llava_cot.evaluate.files.parquet import Parquet
    from llava_cot.evaluate.files.tsv import Tsv

    path = Path(path)
    if path.is_dir():
        shards = sorted(path.glob("*.parquet"))
        if not shards:
            raise ValueError(f"{path}: a folder must hold *.parquet files, and this one holds none")
        return Parquet(path, shards)
    try:
        with open(path, "rb") as file:
            head = file.read(HEAD)
    except OSError as error:
        raise ValueError(f"{path}: it can't be read: {error.strerror}") from None
    if not head:
        raise ValueError(f"{path}: it is empty")
    if head.startswith(b"PAR1"):
        return Parquet(path, [path])
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if b"\0" not in head:
        if text.startswith(b"{"):
            return JsonLines(path)
        if b"\t" in text.split(b"\n", 1)[0]:
            return Tsv(path)
    raise ValueError(f"{path}: it must be tab-separated, JSON lines or parquet, and starts with {head[:16]!r}")
