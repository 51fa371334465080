"""Uvicorn's protocol, with a limit of time for a request's headers, which uvicorn does not have."""

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

TIMEOUT = b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"


class HeaderTimeout(H11Protocol):
    """Answers 408 and closes a connection on which a request's headers have not arrived in time.

    Pass a subclass as uvicorn's ``http``; ``with_header_timeout`` makes it. The time starts with the connection, or
    with the first byte of a further request. Between two requests, ``timeout_keep_alive`` of uvicorn holds.
    """

    seconds: float
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._timer = self.loop.call_later(self.seconds, self._late)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._cancel()
        elif self._timer is None:
            self._timer = self.loop.call_later(self.seconds, self._late)

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel()
        super().connection_lost(exc)

    def _cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _late(self) -> None:
        if not self.transport.is_closing():
            self.transport.write(TIMEOUT)
            self.transport.close()


def with_header_timeout(seconds: float) -> type[HeaderTimeout]:
    """Return the protocol for headers that must arrive within ``seconds``."""
    return type("HeaderTimeout", (HeaderTimeout,), {"seconds": seconds})
