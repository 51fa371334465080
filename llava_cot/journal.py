"""An append-only jsonl file. Each record is one write and one fsync, so a crash loses at most the last line."""

import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from llava_cot.atomic import replacing

Record = Mapping[str, Any]


class JournalKind(NamedTuple):
    """What is written to a journal: the name of the command, and the keys that every record has. One is "id"."""

    name: str
    keys: frozenset[str]


_HEAD = b'{"id": '  # every record begins with this


def dump(record: Record) -> str:
    """Return the record as one line that begins with the id."""
    return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"


def read_journal(path: Path, kind: JournalKind) -> Iterator[dict[str, Any]]:
    """Yield the complete records of the file, if it exists. An incomplete last line is skipped.

    Raises:
        ValueError: a line is not a record of this kind. So another file is not taken for a journal.
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
            if not isinstance(record, dict) or not kind.keys <= record.keys():
                raise ValueError(f"line {number} of {str(path)!r} must be a record of {kind.name}, got {line[:60]!r}")
            yield record


def check_journal(path: Path, name: str) -> None:
    """Check, before any work is done, that a journal can be begun or gone on with.

    Raises:
        ValueError: it is a folder, its folder does not exist, or it may not be written. The message begins with
            ``name``.
    """
    if os.path.isdir(path) or not os.path.isdir(path.parent):
        raise ValueError(f"{name} must be a file in a folder that exists, got {str(path)!r}")
    # Unlike other files a journal is written in place, and made if it is missing.
    if not os.access(path if os.path.exists(path) else path.parent, os.W_OK):
        raise ValueError(f"{name} must be a file that may be written, got {str(path)!r}")


class Journal:
    """A file to append to, which only one process at a time may hold. It is created if it does not exist.

    Raises:
        ValueError: another process is writing to it, or it is not a journal.
    """

    def __init__(self, path: Path, kind: JournalKind) -> None:
        self.path = path
        self._file = self._open()
        try:
            for _ in read_journal(path, kind):
                pass  # a file that is not a journal raises here, before it is cut
            self._cut_torn_line()
        except BaseException:
            self.close()
            raise

    def append(self, record: Record) -> None:
        """Append a record and return when it is on disk. If it cannot be written, the file is unchanged."""
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
        """Replace all records by these, atomically."""
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
            # A process that has just replaced the file lets go of the one that was opened here.
            is_held = not os.path.exists(self.path) or not os.path.samestat(os.fstat(file), os.stat(self.path))
        except BlockingIOError:
            is_held = True
        if is_held:
            os.close(file)
            raise ValueError(f"{str(self.path)!r} must be written by one process, got a second one")
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
