"""Admission: how many requests are let in at once, and how a server that shuts down empties."""

import asyncio
from collections.abc import Callable

from starlette.types import ASGIApp, Receive, Scope, Send

from llava_cot.serve.errors import RETRY, RequestError


class Gate:
    """ASGI middleware that lets at most ``limit`` requests run or wait at once; others get 429.

    While it is ``draining``, new requests get 503. ``on_refused`` is called with the status of each refused request.
    A place is given back when the response has been sent, or when its client has gone.
    """

    def __init__(self, limit: int, on_refused: Callable[[int], None] = lambda status: None) -> None:
        self.limit, self.in_flight, self.is_draining = limit, 0, False
        self.on_refused = on_refused
        self._tasks = set[asyncio.Task[None]]()
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
            self.in_flight += 1
            self._tasks.add(task)
            self._empty.clear()
            try:
                await app(scope, receive, send)
            finally:
                self._tasks.discard(task)
                self.in_flight -= 1
                if not self.in_flight:
                    self._empty.set()

        return gated

    async def drain(self, seconds: float) -> None:
        """Let nobody in any more, wait until all requests are answered, and abort those that are not by then."""
        self.is_draining = True
        try:
            async with asyncio.timeout(seconds):
                await self._empty.wait()
        except TimeoutError:
            for task in [*self._tasks]:
                task.cancel()

    def _refused(self) -> RequestError | None:
        """Why a request is not let in now, or None."""
        if self.is_draining:
            return RequestError(503, "The server is shutting down.", None, "draining", RETRY)
        if self.in_flight >= self.limit:
            message = f"The server answers {self.limit} requests at once, and as many are in flight."
            return RequestError(429, message, None, "queue_full", RETRY)
        return None
