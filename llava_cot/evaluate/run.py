"""Run a benchmark: answer what a run folder does not have yet, score it, and write every result as it is ready."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from llava_cot.atomic import check_output_folder, replacing
from llava_cot.evaluate.benchmark import Benchmark
from llava_cot.evaluate.folder import PROTOCOL, RESULT, RESULTS, TRACES, read_results, trace_stem
from llava_cot.evaluate.manifest import check_same, read_manifest, seed_of, write_manifest
from llava_cot.evaluate.result import Result
from llava_cot.journal import Journal, check_journal
from llava_cot.workers.run import run_tasks
from llava_cot.workers.task import Reply, Task, Workers


def check_folder(path: Path, manifest: Mapping[str, Any]) -> None:
    """Check, before any weights are loaded, that a run with this protocol may go on in a folder or begin there.

    Raises:
        ValueError: it may not. The message says what differs.
    """
    check_writable(path, "out")
    before = read_manifest(path)
    if before is not None:
        check_same(path, before, manifest)
    elif (path / RESULTS).exists():
        raise ValueError(f"out must be a new folder or one of a run, got {str(path)!r}, which has no {PROTOCOL}")


def check_writable(path: Path, name: str) -> None:
    """Check that a run can be written in a folder, which may not exist yet.

    Raises:
        ValueError: it can't. The message begins with ``name``.
    """
    for folder in (path, path / TRACES):
        check_output_folder(folder, name)
    if path.exists():
        check_journal(path / RESULTS, name)


class RunFolder:
    """A run folder that this process alone writes to.

    Its run.json says what the summary is of: until a run that goes on has ended, it stays as it was. So answers are
    scored by the rules in ``manifest``, which are those that the run began with.

    Args:
        manifest: the protocol, which ``check_folder`` has accepted or which was read from the folder.

    Raises:
        ValueError: another process writes to it, or it holds something that is no result.
        OSError: it can't be written.
    """

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        before = read_manifest(path)
        self.path, self.manifest = path, manifest | ({"rules": before["rules"]} if before else {})
        self.done: set[tuple[str, int]] = set()
        path.mkdir(parents=True, exist_ok=True)
        self._journal = Journal(path / RESULTS, RESULT)
        try:
            if before is None:
                write_manifest(path, manifest)
            self.done = {(result.id, result.repeat) for result in self.results()}
        except BaseException:
            self.close()
            raise

    def drop_failed(self) -> None:
        """Forget what failed, so that it is tried again."""
        failed = {(result.id, result.repeat) for result in self.results() if result.outcome == "failed"}
        if failed:
            self.replace(result for result in self.results() if result.outcome != "failed")
            self.done -= failed

    def add(self, result: Result) -> None:
        """Append a result and return when it is on disk."""
        self._journal.append(result.to_dict())
        self.done.add((result.id, result.repeat))

    def results(self) -> Iterator[Result]:
        """Read all results, see ``read_results``."""
        return read_results(self.path)

    def replace(self, results: Iterable[Result]) -> None:
        """Write these results in the place of all."""
        self._journal.keep(result.to_dict() for result in results)

    def write_trace(self, result: Result, trace: Any, images: Sequence[Any], gold: str) -> None:
        """Write the trace of a result as a page, and as an item that ``export`` and ``report`` read, with its image.

        An item names one image. Of several, it names the first.
        """
        from llava_cot.image import open_image
        from llava_cot.trace import Trace

        folder = self.path / TRACES
        folder.mkdir(exist_ok=True)
        stem = trace_stem(result.id, result.repeat)
        opened = [*map(open_image, images)]
        item = {"trace": trace, "gold": gold, "id": result.id}
        if opened:
            item["image"] = f"{stem}.png"
            opened[0].save(folder / item["image"], compress_level=1)
        with replacing(folder / f"{stem}.json") as file:
            file.write(json.dumps(item) + "\n")
        with replacing(folder / f"{stem}.html") as file:
            file.write(Trace(trace).to_html(image=opened, gold=gold) + "\n")

    def close(self) -> None:
        self._journal.close()


def tasks_of(
    benchmark: Benchmark, rows: Iterable[int], preset: str, seed: int, repeats: int, done: Set[tuple[str, int]]
) -> Iterator[tuple[int, Task | Result]]:
    """Yield the row of each question that is not done with its task, or with a result that says why it has none."""
    for repeat in range(repeats):
        for row in rows:
            question = benchmark.question(row)
            key = (question.id, repeat)
            if key in done:
                continue
            of_this = seed_of(seed, question.id, repeat)
            try:
                images = benchmark.images(row)
            except ValueError as error:
                yield row, Result.failed(*key, str(error), of_this)
            else:
                yield row, Task(key, benchmark.prompt(question, preset), images, of_this)


def run(
    benchmark: Benchmark,
    folder: RunFolder,
    workers: Workers,
    rows: Iterable[int],
    *,
    traces: str = "wrong",
    on_result: Callable[[Result], None] = lambda result: None,
) -> None:
    """Answer every question of ``rows`` that the folder does not have. Each result is on disk before the next.

    Args:
        traces: whose traces are written: "all", "wrong" (of answers that are not right) or "none".
    """
    manifest = folder.manifest
    row_of: dict[tuple[str, int], int] = {}

    def finish(result: Result) -> None:
        folder.add(result)
        on_result(result)

    def tasks() -> Iterator[Task]:
        todo = tasks_of(
            benchmark, rows, manifest["preset"], manifest["seed"], manifest["repeats"], frozenset(folder.done)
        )
        for row, task in todo:
            if isinstance(task, Result):
                finish(task)
            else:
                row_of[task.key] = row
                yield task

    for task, reply in run_tasks(tasks(), workers):
        question = benchmark.question(row_of.pop(task.key))
        if not isinstance(reply, Reply):
            finish(Result.failed(*task.key, f"{type(reply).__name__}: {reply}", task.seed))
            continue
        answered = Result(
            *task.key, reply.text, reply.conclusion, reply.outcome, None, None, None, "", reply.usage, seed=task.seed
        )
        result = answered.with_verdict(benchmark.verdict(question, reply.conclusion, manifest["rules"]))
        if traces == "all" or (traces == "wrong" and not result.correct):
            folder.write_trace(result, reply.trace, task.images, question.answer)
        finish(result)
