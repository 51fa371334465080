"""Split a file of training data into good lines, byte for byte, and bad ones, with their line and reason."""

import json
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, nullcontext
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path

from llava_cot.atomic import check_apart, check_output, replacing
from llava_cot.data.checks import LineChecks, Verdict
from llava_cot.data.defect import Defect
from llava_cot.data.rows import raw_rows
from llava_cot.data.tally import Report

CHUNK_LINES, CHUNK_BYTES = 64, 1 << 20  # the most that a worker gets at a time

Judged = tuple[list[bytes], Sequence[Verdict | None]]


def validate_file(
    data: Path | str,
    clean: Path | str,
    quarantine: Path | str,
    checks: LineChecks,
    *,
    report: Path | str | None = None,
    workers: int = 1,
    advance: Callable[[int], None] = lambda count: None,
) -> Report:
    """Copy the good lines of ``data`` to ``clean`` and the bad ones to ``quarantine``, and count both by source.

    ``llava_cot.data.rows`` says what ``data`` may be. The rows of a JSON array or a Parquet table become lines.
    ``quarantine`` gets one object ``{line, reason, raw}`` per bad line. ``raw`` is the line without its newline, and
    ``raw.encode("utf-8", "surrogateescape")`` restores its bytes. The first of several good lines with one id is kept.
    Blank lines are only counted. All files appear when the last line is judged, or not at all. Memory holds a 16-byte
    hash and a line number per kept id (about 120 bytes in all), and a few chunks of lines.

    Args:
        report: the file to which ``Report.to_dict()`` is written as JSON.
        workers: the number of processes that judge lines. With 1, this process does it.
        advance: a function that gets the number of bytes that were judged since its last call.

    Raises:
        ValueError: ``data`` is not a file, two arguments name one file, an output cannot be written, or ``data`` can't
            be read (see ``raw_rows``).
    """
    if workers < 1:
        raise ValueError(f"workers must be >= 1, got {workers}")
    _check_files(data, {"clean": clean, "quarantine": quarantine, "report": report})
    found, firsts, number = Report(), dict[int, int](), 0
    with (
        replacing(report) if report is not None else nullcontext() as report_file,
        replacing(quarantine) as bad,
        replacing(clean) as good,
        closing(_judge(_chunks(raw_rows(data)), checks, workers)) as judged,
    ):
        for chunk, verdicts in judged:
            for line, verdict in zip(chunk, verdicts, strict=True):
                number += 1
                if verdict is not None and verdict.defect is None:
                    verdict = _first(verdict, firsts, number)
                found.add(verdict)
                if verdict is None:
                    continue
                elif verdict.defect is None:
                    good.buffer.write(line)
                else:
                    bad.buffer.write(_entry(number, verdict.defect, line))
            advance(sum(map(len, chunk)))
        assert found.lines == number
        if report_file is not None:
            json.dump(found.to_dict(), report_file, indent=1)
            report_file.write("\n")
    return found


def _check_files(data: Path | str, outputs: dict[str, Path | str | None]) -> None:
    if not os.path.isfile(data):
        raise ValueError(f"data must be a file, got {str(data)!r}")
    taken = {"data": data}
    for name, path in outputs.items():
        if path is None:
            continue
        check_output(path, name)
        for other, other_path in taken.items():
            check_apart(path, name, other_path, other)
        taken[name] = path


def _chunks(rows: Iterator[bytes]) -> Iterator[list[bytes]]:
    chunk, size = list[bytes](), 0
    for line in rows:
        chunk.append(line)
        size += len(line)
        if len(chunk) == CHUNK_LINES or size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _judge(chunks: Iterator[list[bytes]], checks: LineChecks, workers: int) -> Generator[Judged, None, None]:
    """Yield chunks in order, with a verdict per line, which is None for a blank line."""
    if workers == 1:
        for chunk in chunks:
            yield chunk, _verdicts(chunk, checks)
        return
    context = multiprocessing.get_context("forkserver")  # imports once for all workers, and inherits no threads
    context.set_forkserver_preload([__name__])
    pool = ProcessPoolExecutor(workers, context, _start_worker, (checks,))
    waiting = deque[tuple[list[bytes], Future[list[Verdict | None]]]]()
    try:
        for chunk in chunks:
            waiting.append((chunk, pool.submit(_verdicts, chunk)))
            if len(waiting) > 2 * workers:
                chunk, future = waiting.popleft()
                yield chunk, future.result()
        for chunk, future in waiting:
            yield chunk, future.result()
    except BrokenProcessPool:
        raise ChildProcessError("a worker was killed, perhaps because memory ran out; try fewer --workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


_checks: LineChecks  # one per worker, so that its cache of images lives as long as the worker


def _start_worker(checks: LineChecks) -> None:
    global _checks
    _checks = checks
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends the pool
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)  # a pool does not notice that its parent was killed


def _verdicts(chunk: list[bytes], checks: LineChecks | None = None) -> list[Verdict | None]:
    judge = checks or _checks
    return [judge(line) if line.strip() else None for line in chunk]


def _first(verdict: Verdict, firsts: dict[int, int], number: int) -> Verdict:
    """Return the verdict, or a defect if its id has been kept before."""
    digest = int.from_bytes(blake2b(verdict.id.encode(), digest_size=16).digest())
    first = firsts.setdefault(digest, number)
    if first == number:
        return verdict
    return replace(verdict, defect=Defect("duplicate id", f"{verdict.id[:200]!r} is that of line {first}"), warnings=())


def _entry(number: int, defect: Defect, line: bytes) -> bytes:
    raw = line.removesuffix(b"\n").decode("utf-8", "surrogateescape")
    entry = {"line": number, "reason": str(defect), "raw": raw}
    try:
        return json.dumps(entry, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # the line is not UTF-8: its odd bytes are written as escapes
        return json.dumps(entry).encode() + b"\n"
