"""A thread with an event loop, and threads for work that would hold the loop up."""

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

Result = TypeVar("Result")
WORKER = "llava-cot scorer"


class LoopThread:
    """Runs coroutines in one event loop in a background thread, and functions in a few threads beside it."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._workers = ThreadPoolExecutor(thread_name_prefix=WORKER)
        self._is_closed = False
        self._closing = threading.Lock()
        self._thread = threading.Thread(target=self._loop.run_forever, name="llava-cot requests", daemon=True)
        self._thread.start()

    def start(self, work: Coroutine[Any, Any, Result]) -> Future[Result]:
        """Start a coroutine in the loop. Cancelling what is returned cancels it.

        Raises:
            ValueError: the loop has been closed.
        """
        with self._closing:  # what is started before it closes is cancelled when it does
            if not self._is_closed:
                return asyncio.run_coroutine_threadsafe(work, self._loop)
        work.close()
        raise ValueError("the connection must be open, but it has been closed")

    async def in_thread(self, function: Callable[[], Result]) -> Result:
        """Await a function that runs in a thread beside the loop."""
        return await self._loop.run_in_executor(self._workers, function)

    def in_background(self, function: Callable[[], None]) -> None:
        """Let a function run in a thread beside the loop, unless that has been closed."""
        with suppress(RuntimeError):
            self._workers.submit(function)

    def close(self, last: Callable[[], Coroutine[Any, Any, None]] | None = None) -> None:
        """Cancel everything that runs in the loop, run ``last`` in it, and end the threads. Closing twice is fine."""
        with self._closing:
            if self._is_closed:
                return
            self._is_closed = True
        asyncio.run_coroutine_threadsafe(self._end(last), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        is_worker = threading.current_thread().name.startswith(WORKER)  # it can't wait for itself
        self._workers.shutdown(wait=not is_worker)

    async def _end(self, last: Callable[[], Coroutine[Any, Any, None]] | None) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if last is not None:
            await last()


async def gathered(works: Iterable[Coroutine[Any, Any, Result]]) -> list[Result]:
    """Await all of ``works`` at once. When one fails, or this is cancelled, the others are cancelled and awaited."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
