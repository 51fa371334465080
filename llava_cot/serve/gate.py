"""Admission: how many requests are let in at once, and how a server that shuts down empties."""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llava_cot.serve.errors import CLOSE, RETRY, RequestError


class Gate:
    """ASGI middleware that lets at most ``limit`` requests run or wait at once; others get 429.

    While it is ``draining``, new requests get 503. ``on_refused`` is called with the status of each refused request.
    A place is given back when the response has been sent, or when its client has gone.
    """

    def __init__(self, limit: int, on_refused: Callable[[int], None] = lambda status: None) -> None:
        self.limit, self.in_flight, self.is_draining = limit, 0, False
        self.on_refused = on_refused
        self._tasks, self._ended = set[asyncio.Task[None]](), set[asyncio.Task[None]]()
        self._arriving = set[asyncio.Timeout]()
        self._empty = asyncio.Event()
        self._empty.set()

    def wrap(self, app: ASGIApp) -> ASGIApp:
        """Return ``app`` behind this gate. Only POST requests run searches, so that only they need a place."""

        async def gated(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http" or scope["method"] != "POST":
                return await app(scope, receive, send)
            if refused := self._refused():
                self.on_refused(refused.status)
                return await refused.response()(scope, receive, send)
            task = asyncio.current_task()
            assert task is not None
            head: Message | None = None

            async def noted(message: Message) -> None:
                nonlocal head
                head = message if message["type"] == "http.response.start" else head
                await send(message)

            self.in_flight += 1
            self._tasks.add(task)
            self._empty.clear()
            try:
                await app(scope, receive, noted)
            except asyncio.CancelledError:
                if task not in self._ended:
                    raise
                task.uncancel()
                await _excuse(head, scope, receive, send)
            finally:
                self._ended.discard(task)
                self._tasks.discard(task)
                self.in_flight -= 1
                if not self.in_flight:
                    self._empty.set()

        return gated

    @asynccontextmanager
    async def arriving(self, seconds: float) -> AsyncGenerator[None, None]:
        """Give a body ``seconds`` to arrive, or less if the server has drained by then.

        Raises:
            RequestError: 408 or 503, it has not arrived.
        """
        try:
            async with asyncio.timeout(seconds) as time:
                self._arriving.add(time)
                try:
                    yield
                finally:
                    self._arriving.discard(time)
        except TimeoutError:
            if self.is_draining:
                raise _draining() from None
            message = f"The body did not arrive in {seconds:g} seconds."
            raise RequestError(408, message, None, "body_timeout", CLOSE) from None

    async def drain(self, seconds: float) -> None:
        """Let nobody in any more, wait until all requests are answered, and end those that are not by then."""
        self.is_draining = True
        try:
            async with asyncio.timeout(seconds):
                await self._empty.wait()
        except TimeoutError:
            self._ended |= self._tasks
            for task in self._ended:
                task.cancel()
        for time in self._arriving:
            if not time.expired():
                time.reschedule(0)

    def _refused(self) -> RequestError | None:
        """Why a request is not let in now, or None."""
        if self.is_draining:
            return _draining()
        if self.in_flight >= self.limit:
            message = f"The server answers {self.limit} requests at once, and as many are in flight."
            return RequestError(429, message, None, "queue_full", RETRY)
        return None


async def _excuse(head: Message | None, scope: Scope, receive: Receive, send: Send) -> None:
    """End the response of a request that was aborted. ``head`` is its beginning, if that has been sent."""
    error = _draining()
    if head is None:
        await error.response()(scope, receive, send)
    elif any(value.startswith(b"text/event-stream") for _, value in head["headers"]):
        await send({"type": "http.response.body", "body": f"data: {json.dumps(error.body)}\n\n".encode()})


def _draining() -> RequestError:
    return RequestError(503, "The server is shutting down.", None, "draining", {**RETRY, **CLOSE})
