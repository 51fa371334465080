"""The folder of a run: what is in it, and how it is read.

``run.json`` is the run's protocol: an object of everything that its numbers depend on. ``results.jsonl`` has one
``Result`` a line. ``summary.json`` is what ``summarise`` returns, and ``traces/`` has the traces of wrong answers.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import quote

from llava_cot.evaluate.benchmark import Benchmark
from llava_cot.evaluate.benchmarks import open_benchmark
from llava_cot.evaluate.question import Question
from llava_cot.evaluate.result import Result, Scored
from llava_cot.journal import JournalKind, read_journal

RESULT = JournalKind("evaluate", frozenset({"id", "repeat", "text", "outcome"}))
PROTOCOL, RESULTS, SUMMARY, TRACES = "run.json", "results.jsonl", "summary.json", "traces"
STEM_LENGTH = 150  # file systems allow 255 bytes


@dataclass(frozen=True)
class Run:
    """A run that was read from its folder."""

    path: Path
    protocol: Mapping[str, Any]
    results: Sequence[Result]

    def scored(self, benchmark: Benchmark) -> list[Scored]:
        """Return the results that the protocol asks, with their questions.

        Raises:
            ValueError: the benchmark has no question of such an id.
        """
        questions = find_questions(benchmark, {result.id for result in self.results})
        wanted = {*asked(benchmark, self.protocol, ((result.id, result.repeat) for result in self.results))}
        return [Scored(questions[result.id], result) for result in self.results if (result.id, result.repeat) in wanted]


def read_run(path: Path | str) -> Run:
    """Read a run's folder.

    Raises:
        ValueError: it is no folder of a run, or something in it can't be read. The message names the file and the line.
    """
    path = Path(path)
    for name in (PROTOCOL, RESULTS):
        if not (path / name).is_file():
            raise ValueError(f"run must be a folder that `llava-cot evaluate` wrote, got {str(path)!r} without {name}")
    return Run(path, read_protocol(path), [*read_results(path)])


def read_results(folder: Path) -> Iterator[Result]:
    """Read all results of a run's folder. A torn last line, which a killed run may leave, is skipped.

    Raises:
        ValueError: a line is no result, or is of the same question and repeat as an earlier one.
    """
    path, seen = folder / RESULTS, set[tuple[str, int]]()
    for number, record in enumerate(read_journal(path, RESULT), 1):
        where = f"{str(path)!r}, line {number}"
        try:
            result = Result.from_dict(record)
        except ValueError as error:
            raise ValueError(f"{where}: must be a result, got {error}") from None
        if (result.id, result.repeat) in seen:
            raise ValueError(f"{where}: each id and repeat must stand once, got {result.id!r:.200} again")
        seen.add((result.id, result.repeat))
        yield result


def read_protocol(path: Path) -> dict[str, Any]:
    """Read the protocol of a run's folder.

    Raises:
        ValueError: it is none. The message names the file and the key.
    """
    protocol = read_object(path / PROTOCOL)
    for key in ("benchmark", "rules"):
        if not isinstance(protocol.get(key), str):
            raise ValueError(f"{str(path / PROTOCOL)!r} must name its {key}, got {protocol.get(key)!r}")
    for key, kind in {"dataset": dict, "limit": int, "repeats": int}.items():
        if not isinstance(protocol.get(key), (kind, type(None))):
            raise ValueError(f"{key} in {str(path / PROTOCOL)!r} must be {kind.__name__}, got {protocol[key]!r:.80}")
    return protocol


def read_object(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises:
        ValueError: it holds something else.
    """
    try:
        value = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} must be JSON, got {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{str(path)!r} must be an object, got {type(value).__name__}")
    return value


def open_evaluated(protocol: Mapping[str, Any], data: Path | str | None, whose: str) -> Benchmark:
    """Open the file that was evaluated.

    Args:
        data: where it is now; None is where ``protocol`` says that it was.
        whose: in messages, such as "the run".

    Raises:
        ValueError: it is another file.
    """
    dataset = protocol.get("dataset") or {}
    path, md5 = data or dataset.get("path"), dataset.get("md5")
    benchmark = open_benchmark(protocol["benchmark"], path, allow_partial=True)
    if benchmark.dataset.md5 != md5:
        raise ValueError(
            f"data must be the file of {whose}, with md5 {md5}, got {str(path or benchmark.name)!r} with "
            f"{benchmark.dataset.md5}"
        )
    return benchmark


def selected(benchmark: Benchmark, limit: int | None) -> Sequence[int]:
    """Return the rows to ask: the first ``limit``, and whatever completes the groups that they belong to."""
    rows = range(len(benchmark))
    if limit is None or not benchmark.is_grouped:
        return rows[:limit]
    groups = {benchmark.question(row).group for row in rows[:limit]}
    return [row for row in rows if row < limit or benchmark.question(row).group in groups]


def asked(
    benchmark: Benchmark, protocol: Mapping[str, Any], keys: Iterable[tuple[str, int]]
) -> Iterator[tuple[str, int]]:
    """Yield the ids and repeats among ``keys`` that a run with this protocol asks.

    Its folder may have others, of an earlier run with more questions or repeats. They are kept and not counted.
    """
    limit, repeats = protocol.get("limit"), protocol.get("repeats") or 1
    ids = None if limit is None else {benchmark.question(row).id for row in selected(benchmark, limit)}
    return (key for key in keys if key[1] < repeats and (ids is None or key[0] in ids))


def find_questions(benchmark: Benchmark, ids: set[str]) -> dict[str, Question]:
    """Return the questions of these ids.

    Raises:
        ValueError: some are not in the benchmark's file.
    """
    found: dict[str, Question] = {}
    missing = []
    for id in sorted(ids):
        try:
            found[id] = benchmark.question(benchmark.number_of(id))
        except KeyError:
            missing.append(id)
    if missing:
        where = benchmark.dataset.path or benchmark.name
        raise ValueError(
            f"results must be of questions in {str(where)!r}, got {len(missing):,} others, such as id {missing[0]!r}"
        )
    return found


def trace_stem(id: str, repeat: int = 0) -> str:
    """Return the name, without its suffix, of the files of a trace: the id, as far as a file may be called so.

    An id that is too long ends in a digest, and a repeat after the first in "@" and its number. No id has an "@" here.
    """
    stem = quote(id, safe="", errors="surrogatepass")
    if len(stem) > STEM_LENGTH:
        stem = f"{stem[: STEM_LENGTH - 17]}-{sha256(stem.encode()).hexdigest()[:16]}"
    return stem + (f"@{repeat}" if repeat else "")
