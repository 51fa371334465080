"""An append-only jsonl: each record is one write and one fsync, so that a kill costs the last line at most."""

import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from llava_cot.atomic import replacing

Record = Mapping[str, Any]
_HEAD = b'{"id": '  # how every record begins


def dump(record: Record) -> str:
    """One line; the id comes first."""
    return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"


def read_journal(path: Path) -> Iterator[dict[str, Any]]:
    """The whole records of the file, if there is one; a torn last line is passed over.

    Raises:
        ValueError: a line that no journal has, so that another file is not taken for one.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n") and (line.startswith(_HEAD) or _HEAD.startswith(line)):
                return
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = None
            if not isinstance(record, dict) or "id" not in record or "provenance" not in record:
                raise ValueError(f"line {number} of {str(path)!r} must be a record of annotate, got {line[:60]!r}")
            yield record


class Journal:
    """The file to append to, held by one process at a time; made if it is not there.

    Raises:
        ValueError: another process is writing to it, or it is no journal.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = self._open()
        try:
            for _ in read_journal(path):
                pass  # a file that is something else raises here, before it is cut
            self._cut_torn_line()
        except BaseException:
            self.close()
            raise

    def append(self, record: Record) -> None:
        """Returns when the record is on the disk; if it can't be written the file is as it was."""
        size = os.fstat(self._file).st_size
        data = dump(record).encode()
        try:
            if os.write(self._file, data) != len(data):
                raise OSError(f"{str(self.path)!r} must have room for {len(data)} bytes: the disk is full")
            os.fsync(self._file)
        except OSError:
            os.ftruncate(self._file, size)
            raise

    def keep(self, records: Iterable[Record]) -> None:
        """Put these in the place of all that is there, at once."""
        with replacing(self.path) as file:
            for record in records:
                file.write(dump(record))
            file.flush()
            os.fsync(file.fileno())
        old, self._file = self._file, self._open()
        os.close(old)

    def close(self) -> None:
        os.close(self._file)

    def _open(self) -> int:
        file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            raise ValueError(f"{str(self.path)!r} must be written by one process, got a second one") from None
        return file

    def _cut_torn_line(self) -> None:
        at = size = os.fstat(self._file).st_size
        while at > 0:
            start = max(0, at - 65536)
            newline = os.pread(self._file, at - start, start).rfind(b"\n")
            if newline >= 0:
                at = start + newline + 1
                break
            at = start
        if at < size:
            os.ftruncate(self._file, at)
            os.fsync(self._file)
