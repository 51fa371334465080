"""Decide who may send a request, and receive its body, before any route sees it."""

import asyncio
import base64
import binascii
import hmac
import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from hashlib import sha256
from ipaddress import ip_address
from pathlib import Path

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llava_cot.serve.errors import CLOSE, RequestError
from llava_cot.serve.gate import Gate
from llava_cot.serve.held import Held, Holding
from llava_cot.serve.limits import Limits

KEYS = "LLAVA_COT_API_KEY"
OPEN = ("/health", "/live")  # the routes that need no key
SAFE = ("GET", "HEAD", "OPTIONS")
LINGER = 2.0  # seconds
MAX_HEADERS = 100
MAX_HEADER_BYTES = 2**14
CHALLENGE = {"WWW-Authenticate": 'Basic realm="llava-cot"'}  # Chromium asks for no key if Bearer is named here too


def read_keys(
    path: str | os.PathLike[str] | None = None, environment: Mapping[str, str] = os.environ
) -> tuple[str, ...]:
    """Return the API keys of LLAVA_COT_API_KEY, which commas separate, and of a file with one on each line.

    Raises:
        ValueError: a source that is given has no key, or a key is not printable ASCII without spaces.
        OSError: the file can't be read.
    """
    sources = {}
    if KEYS in environment:
        sources[KEYS] = environment[KEYS].split(",")
    if path is not None:
        sources[f"the file {os.fspath(path)}"] = Path(path).read_text("utf-8").splitlines()
    keys: list[str] = []
    for name, lines in sources.items():
        found = [line.strip() for line in lines if line.strip()]
        if not found:
            raise ValueError(f"{name} must have at least one API key, got none")
        if not all(re.fullmatch(r"[!-~]+", key) for key in found):
            raise ValueError(f"an API key of {name} must be printable ASCII without spaces")
        keys += found
    return tuple(keys)


def is_loopback(host: str) -> bool:
    """Whether ``host`` is a name or an address of this machine that no other machine can reach."""
    host = host.lower().removeprefix("[").removesuffix("]")
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def check_bind(host: str, keys: Iterable[str], allow: bool) -> None:
    """Check that a server that other machines can reach asks for a key.

    Args:
        host: the address to listen at.
        keys: the API keys.
        allow: whether to listen there without a key all the same.

    Raises:
        ValueError: it does not.
    """
    if not is_loopback(host) and not any(keys) and not allow:
        raise ValueError(
            f"host must be a loopback address such as 127.0.0.1 if there is no API key, got {host}: set {KEYS}"
        )


class Guard:
    """ASGI middleware that lets a request pass if it has a key, and hands on its body once all of it is there.

    A key comes as a bearer token, or as the password of HTTP Basic, with which a browser can open the page. Without
    keys, a server on a loopback address answers only to loopback names, so that a foreign page can't reach it through a
    name of its own that resolves to this machine. A request with another method than GET, HEAD and OPTIONS must
    declare JSON, so that a browser asks first before it sends one for a foreign page, and no header ever permits that.

    Uvicorn bounds headers that are still arriving, by its ``h11_max_incomplete_event_size``, and what comes in one read
    is bounded here. ``with_header_timeout`` limits their time.

    Args:
        keys: any of them is enough. Without any, every request has passed.
        host: the address that the server listens at.
        held: what all requests hold. What this one holds is ``request.state.holding`` for the app.
        gate: counts refused requests, and bounds the time in which a body arrives.

    Raises:
        ValueError: a key is empty.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: Iterable[str],
        host: str,
        limits: Limits,
        held: Held,
        gate: Gate,
    ) -> None:
        self.app, self.limits, self.loopback = app, limits, is_loopback(host)
        self._held, self._gate = held, gate
        keys = list(keys)
        if not all(keys):
            raise ValueError("keys must not be empty strings")
        self._digests = [sha256(key.encode("ascii")).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1008})
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        holding = self._held.holding()
        scope.setdefault("state", {})["holding"] = holding
        try:
            try:
                replayed = await self._admitted(scope, receive, holding)
            except RequestError as error:
                self._gate.on_refused(error.status)
                return await error.response()(scope, receive, send)
            if replayed is not None:
                await self.app(scope, replayed, send)
        finally:
            holding.close()

    async def _admitted(self, scope: Scope, receive: Receive, holding: Holding) -> Receive | None:
        """What the app receives, or None if the client has gone."""
        try:
            self._check(scope)
        except RequestError:
            await self._linger(scope, receive)
            raise
        return await self._body(scope, receive, holding)

    def _check(self, scope: Scope) -> None:
        _check_headers(scope)
        if scope["path"] not in OPEN:
            self._admit(scope)
        declared, most = _values(scope, b"content-length"), self._most_bytes(scope)
        if declared and not (declared[0].isdecimal() and len(declared[0]) < 20 and int(declared[0]) <= most):
            raise _too_large(most)

    def _most_bytes(self, scope: Scope) -> int:
        """How long the body may be. Who needs no key must not fill the memory that all requests share."""
        return 0 if scope["path"] in OPEN else self.limits.max_body_bytes

    def _admit(self, scope: Scope) -> None:
        if self._digests:
            self._check_key(_values(scope, b"authorization"))
        elif self.loopback:
            hosts = _values(scope, b"host")
            if len(hosts) != 1 or not is_loopback(re.sub(r":[0-9]*$", "", hosts[0])):
                raise RequestError(403, "Without an API key, this server answers to loopback names only.", None, "host")
        if scope["method"] not in SAFE:
            kinds = [value.partition(";")[0].strip().lower() for value in _values(scope, b"content-type")]
            if kinds != ["application/json"]:
                raise RequestError(415, "The Content-Type must be application/json.", None, "content_type", CLOSE)
            if any(value.lower() != "identity" for value in _values(scope, b"content-encoding")):
                raise RequestError(415, "The body must not be compressed.", None, "content_encoding", CLOSE)

    def _check_key(self, values: list[str]) -> None:
        digest = sha256(_key_of(values).encode("latin-1")).digest()
        matches = [hmac.compare_digest(digest, known) for known in self._digests]  # all of them, so in constant time
        if not any(matches):
            raise RequestError(401, "The API key is missing or wrong.", None, "invalid_api_key", {**CHALLENGE, **CLOSE})

    async def _body(self, scope: Scope, receive: Receive, holding: Holding) -> Receive | None:
        """What the app receives: the whole body, which is not held here. None if the client has gone."""
        most = self._most_bytes(scope)
        body = bytearray()
        async with self._gate.arriving(self.limits.max_body_seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return None
                part, more = message.get("body", b""), message.get("more_body", False)
                try:
                    if len(body) + len(part) > most:
                        raise _too_large(most)
                    holding.add(bytes=len(part))
                except RequestError:
                    if more:
                        await self._linger(scope, receive)
                    raise
                body += part
                if not more:
                    return _replay(bytes(body), receive)

    async def _linger(self, scope: Scope, receive: Receive) -> None:
        """Drop the rest of a body that is on its way. A connection closed with it unread would lose the response."""
        if _values(scope, b"expect"):
            return
        size = 0
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER):
                while size <= 4 * self.limits.max_body_bytes:
                    message = await receive()
                    size += len(message.get("body", b""))
                    if not message.get("more_body", False):
                        return


def _check_headers(scope: Scope) -> None:
    size = sum(len(name) + len(value) for name, value in scope["headers"])
    if len(scope["headers"]) > MAX_HEADERS or size > MAX_HEADER_BYTES:
        raise RequestError(431, "The request has too many or too long headers.", None, "headers_too_large", CLOSE)
    if _values(scope, b"content-length") and _values(scope, b"transfer-encoding"):  # a proxy may believe the other one
        message = "The request must not have both a Content-Length and a Transfer-Encoding."
        raise RequestError(400, message, None, "ambiguous_length", CLOSE)


def _too_large(most: int) -> RequestError:
    return RequestError(413, f"The body may have at most {most} bytes.", None, "body_too_large", CLOSE)


def _values(scope: Scope, name: bytes) -> list[str]:
    return [value.decode("latin-1") for key, value in scope["headers"] if key.lower() == name]


def _key_of(values: list[str]) -> str:
    """The key of the Authorization headers, or "", which no key is."""
    scheme, _, rest = values[0].partition(" ") if len(values) == 1 else ("", "", "")
    if scheme.lower() == "bearer":
        return rest.strip()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(rest.strip(), validate=True).decode("latin-1").partition(":")[2]
        except (binascii.Error, ValueError):
            return ""
    return ""


def _replay(body: bytes, receive: Receive) -> Receive:
    """What the app receives: the body once, and then what the client does."""
    waiting = [body]

    async def replayed() -> Message:
        if waiting:
            return {"type": "http.request", "body": waiting.pop(), "more_body": False}
        return await receive()

    return replayed
