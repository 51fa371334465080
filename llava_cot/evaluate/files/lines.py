"""The lines of a text file with the byte that each one starts at."""

from collections.abc import Iterator
from typing import IO, Protocol

LONGEST_LINE = 1 << 30  # bytes


class Digest(Protocol):
    def update(self, data: bytes, /) -> None: ...


class Lines(Iterator[str]):
    """Read lines of UTF-8 as text, and feed their bytes to ``digest``.

    Attributes:
        offset: the byte that the next line starts at.

    Raises:
        UnicodeDecodeError: a line is not UTF-8.
        ValueError: a line has over 1 GiB.
    """

    def __init__(self, file: IO[bytes], digest: Digest | None = None) -> None:
        self._file = file
        self._digest = digest
        self.offset = file.tell()

    def __next__(self) -> str:
        line = self._file.readline(LONGEST_LINE)
        if not line:
            raise StopIteration
        if len(line) == LONGEST_LINE:
            raise ValueError(f"its line has over {LONGEST_LINE} bytes")
        if self._digest is not None:
            self._digest.update(line)
        start, self.offset = self.offset, self.offset + len(line)
        return line.decode("utf-8-sig" if start == 0 else "utf-8")
