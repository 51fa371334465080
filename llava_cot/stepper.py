"""One thread that owns an engine, for callers in asyncio event loops."""

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from llava_cot.core import Backend

CLOSED = "the engine must be open, but it has been closed"


class Work(Protocol):
    """Something that ends while the engine steps."""

    done: bool

    def cancel(self) -> None: ...


@dataclass(eq=False)
class _Waiting:
    """A task that waits for ``work`` in an event loop."""

    work: Work
    after_step: Callable[[], None]
    loop: asyncio.AbstractEventLoop
    ended: asyncio.Future[None]

    def end(self, error: Exception | None = None) -> None:
        """Wake the task up, from any thread."""
        with suppress(RuntimeError):  # its event loop has been closed
            self.loop.call_soon_threadsafe(self._resolve, error)

    def _resolve(self, error: Exception | None) -> None:
        if not self.ended.done():
            if error is None:
                self.ended.set_result(None)
            else:
                self.ended.set_exception(error)


class AsyncEngine:
    """Steps ``engine`` in a thread of its own while there is work; that thread starts with the first ``run``."""

    def __init__(self, engine: Backend) -> None:
        self.engine = engine
        self._changed = threading.Condition()
        self._waiting: list[_Waiting] = []
        self._thread: threading.Thread | None = None
        self._is_closed = False

    async def run(self, work: Work, after_step: Callable[[], None] = lambda: None) -> None:
        """Wait until ``work`` is done. Cancelling the awaiting task cancels ``work``.

        ``after_step`` is called in the engine's thread after each step.

        Raises:
            RuntimeError: the engine has been closed.
        """
        loop = asyncio.get_running_loop()
        waiting = _Waiting(work, after_step, loop, loop.create_future())
        try:
            with self._changed:
                if self._is_closed:
                    raise RuntimeError(CLOSED)
                self._waiting.append(waiting)
                if self._thread is None:
                    self._thread = threading.Thread(target=self._serve, name="llava-cot engine", daemon=True)
                    self._thread.start()
                self._changed.notify_all()
            await waiting.ended
        finally:
            self._forget(waiting)
            work.cancel()

    def close(self) -> None:
        """Cancel what still runs and end the thread."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _serve(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._is_closed:
                    self._changed.wait()
                waiting = [*self._waiting]
                if self._is_closed:
                    break
            with suppress(BaseException):  # its search has it as its error; this thread goes on for the others
                self.engine.step()
            for one in waiting:
                error, is_done = None, one.work.done  # before the look, or what comes between would be lost
                try:
                    one.after_step()
                except Exception as raised:  # it is raised in the task that waits
                    error = raised
                if error or is_done:
                    self._forget(one)
                    one.end(error)
        for one in waiting:
            one.work.cancel()
            one.end(RuntimeError(CLOSED))

    def _forget(self, waiting: _Waiting) -> None:
        with self._changed:
            if waiting in self._waiting:
                self._waiting.remove(waiting)
