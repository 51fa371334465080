"""Programs on an engine, for tests that look behind the boundary: a program is given the engine's own branches."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from llava_cot.core import Continuation
from llava_cot.engine.engine import Engine
from llava_cot.search.drive import Drive


class Job:
    """``program(root)`` on ``inputs``; replies come as ``Branch`` objects, whose ``id`` requests name."""

    def __init__(self, inputs: dict[str, Any], program: Callable[..., Any]):
        self.inputs, self.program = inputs, program
        self.prompt_length = inputs["input_ids"].shape[1]
        self.drive: Drive | None = None
        self._is_cancelled = False

    def start(self, engine: Engine) -> None:
        if not self._is_cancelled:
            self.session = engine.open(self.inputs)
            self.inner = self.session._job
            self.drive = Drive(self.session, self._translated(self.program(self.inner.root)))

    def cancel(self) -> None:
        self._is_cancelled = True
        if self.drive is not None:
            self.drive.cancel()

    @property
    def done(self) -> bool:
        return self._is_cancelled or (self.drive is not None and self.drive.done)

    @property
    def result(self) -> Any:
        return None if self.drive is None else self.drive.result

    @property
    def error(self) -> Exception | None:
        return None if self.drive is None else self.drive.error

    @property
    def usage(self):
        return self.session.usage

    @property
    def branches(self):
        return self.inner.branches if self.drive is not None else []

    @property
    def was_paused(self) -> bool:
        return self.inner.was_paused

    def _translated(self, coroutine):
        reply, failure = None, None
        try:
            while True:
                try:
                    requests = coroutine.throw(failure) if failure else coroutine.send(reply)
                except StopIteration as stop:
                    return stop.value
                reply = failure = None
                try:
                    replies = yield requests
                    reply = [[self._branch(found) for found in part] for part in replies]
                except Exception as error:
                    failure = error
        finally:
            coroutine.close()

    def _branch(self, found: Any) -> Any:
        return self.inner.by_id[found.id] if isinstance(found, Continuation) else found


def run(engine: Engine, jobs: Sequence[Job]) -> None:
    for _ in steps(engine, jobs):
        pass


def steps(engine: Engine, jobs: Sequence[Job]) -> Iterator[None]:
    """Run jobs to their end, yielding after each step; closing the iterator cancels what still runs."""
    try:
        for job in jobs:
            job.start(engine)
        while not all(job.done for job in jobs):
            engine.step()
            yield
    finally:
        for job in jobs:
            if not job.done:
                job.cancel()
