"""One prompt on a server, and what grows from it."""

import asyncio
import math
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import MethodType
from typing import TYPE_CHECKING, Any

from llava_cot.backends.openai.draft import Draft
from llava_cot.backends.openai.loop import gathered
from llava_cot.backends.openai.wire import Kind, Prefix, Reply
from llava_cot.core import Call, Expand, Extend, Feature, Finish, Release, Replies, Request, Usage, check_features

if TYPE_CHECKING:
    from llava_cot.backends.openai.server import Server


class Session:
    """What ``Server.open`` returns, and ``llava_cot.core.Session`` describes.

    Its requests hold it weakly. When its owner has let go of it, they are cancelled.
    """

    root = 0

    def __init__(self, work: "Work") -> None:
        self._work, self.usage = work, work.usage
        weakref.finalize(self, work.cancel).atexit = False

    @property
    def prompt_tokens(self) -> int:
        """See ``llava_cot.core.Session.prompt_tokens``. It is known once the first reply has come."""
        return self._work.prompt_tokens or 0

    @property
    def growing(self) -> list[tuple[int, ...]]:
        """Nothing: a server tells the tokens when a continuation has ended."""
        return []

    def ask(self, requests: Sequence[Request], done: Callable[[Replies], None]) -> None:
        """See ``llava_cot.core.Session.ask``. ``done`` runs in a thread of the server's."""
        self._work.check(requests)
        # A bound method is held weakly: its object holds the session, and the two would keep each other alive.
        self._work.start(requests, weakref.WeakMethod(done) if isinstance(done, MethodType) else lambda: done)

    def close(self) -> None:
        """See ``llava_cot.core.Session.close``. The connections of running requests are closed."""
        self._work.cancel()


@dataclass(eq=False)
class Work:
    """The requests of one session, and the continuations that they have returned.

    ``prepare`` makes the messages of the prompt. ``prefixes`` are all continuations by id. Where the server does not
    tell tokens, ``stand_ins`` has made some up for each text, so that equal texts have equal tokens.
    """

    server: "Server"
    prepare: Callable[[], list[dict[str, Any]]] | None
    usage: Usage = field(default_factory=Usage)
    prefixes: dict[int, Prefix] = field(default_factory=lambda: {0: Prefix("", ())})
    prompt_tokens: int | None = None
    stand_ins: dict[str, tuple[int, ...]] = field(default_factory=dict)
    next_stand_in: int = 0
    next_id: int = 1
    is_over: bool = False
    is_busy: bool = False  # whether it has been asked and has not answered
    _messages: list[dict[str, Any]] | None = None
    _running: "Future[None] | None" = None
    _since: float | None = None  # its seconds are counted up to here

    def check(self, requests: Sequence[Request]) -> None:
        """Raise for what can't be answered, before anything is sent."""
        if self.is_over:
            raise ValueError("the session must be open to be asked, but it has been closed")
        if self.is_busy:
            raise ValueError("the session must have answered before it is asked again")
        for request in requests:
            if not isinstance(request, Request):
                raise TypeError(f"a program must yield requests, got {request!r}")
            if isinstance(request, Extend):
                check_features("Extend", {Feature.EXTEND}, self.server.features)
            for id in request.ids if isinstance(request, Release) else ():
                self._check_id("ids", id)
                if id == 0:
                    raise ValueError("ids must not name the prompt, which lives as long as the session")
            if isinstance(request, Expand):
                self._check_id("parent", request.parent)

    def _check_id(self, name: str, id: int) -> None:
        if id not in self.prefixes:
            wanted = "a continuation of this session that has not been released"
            raise ValueError(f"{name} must name {wanted}, got {id!r}")

    def start(self, requests: Sequence[Request], done: Callable[[], Any]) -> None:
        """Send ``requests``. Their replies go to what ``done`` returns, unless that is None."""
        self.is_busy = True
        self._running = self.server.loop.start(self._answer(requests, done))
        if self.is_over:  # another thread has cancelled it just now
            self._running.cancel()

    def cancel(self) -> None:
        """Cancel what runs, and forget everything."""
        self.is_over = True
        if self._running is not None:
            self._running.cancel()
        self.prepare = self._messages = None
        self.server.notify()

    async def _answer(self, requests: Sequence[Request], done: Callable[[], Any]) -> None:
        self._tick()
        replies: Replies
        try:
            replies = await self._replies(requests)
        except asyncio.CancelledError:
            if self.is_over:
                raise
            replies = RuntimeError("the connection was closed while the search was running")
        except Exception as error:
            replies = error
        self._tick()
        if not self.is_over:
            self.server.loop.in_background(lambda: self._tell(replies, done))

    def _tell(self, replies: Replies, done: Callable[[], Any]) -> None:
        """Pass ``replies`` on, in a thread where scorers may take their time."""
        self.is_busy = False
        try:
            if not self.is_over and (call := done()) is not None:
                call(replies)
        finally:
            self.server.notify()

    def _tick(self) -> None:
        now = time.monotonic()
        self.usage.seconds += now - (now if self._since is None else self._since)
        self._since = now

    async def _replies(self, requests: Sequence[Request]) -> list[Any]:
        if self._messages is None and any(isinstance(request, Expand) for request in requests):
            assert self.prepare is not None
            self._messages = await self.server.loop.in_thread(self.prepare)
            self.prepare = None
        drafts = {at: self._drafts(request) for at, request in enumerate(requests) if isinstance(request, Expand)}
        calls = {at: request for at, request in enumerate(requests) if isinstance(request, Call)}
        growing = [draft for own in drafts.values() for draft in own]
        _, *called = await gathered([self._grow(growing), *map(self._call, calls.values())])
        results = dict(zip(calls, called))
        for at, own in drafts.items():
            parent = requests[at].parent  # type: ignore[union-attr]
            results[at] = [self._keep(draft, parent) for draft in own]
        for request in requests:
            for id in request.ids if isinstance(request, Release) else ():
                self.prefixes.pop(id, None)
        return [results.get(at, []) for at in range(len(requests))]

    async def _call(self, request: Call) -> list[Any] | Exception:
        """Return what a scorer's function returns or raises."""

        def call() -> list[Any]:
            values = [*request.function([*request.items])]
            if len(values) != len(request.items):
                raise ValueError(f"{request.function} must return one result per item, got {len(values)}")
            return values

        try:
            return await self.server.loop.in_thread(call)
        except Exception as error:
            return error

    def _drafts(self, request: Expand) -> list[Draft]:
        self.usage.generations += len(request.seeds)
        return [Draft(request, self.prefixes[request.parent], seed) for seed in request.seeds]

    async def _grow(self, drafts: Sequence[Draft]) -> None:
        """Let every draft grow until something ends it.

        A budget of tokens is shared among those that grow. Those whose share was too small get a share of what the
        others have left, until nothing is left.
        """
        growing = [*drafts]
        while growing:
            limits = [draft.request.limit.seconds for draft in growing if draft.request.limit]
            seconds = min((limit for limit in limits if limit is not None), default=None)
            try:
                async with asyncio.timeout(None if seconds is None else max(0.0, seconds - self.usage.seconds)):
                    await gathered(self._send(*group) for group in self._groups(growing))
                self._tick()
            except TimeoutError:
                self._tick()
                self.usage.seconds = max(self.usage.seconds, seconds or 0.0)
            for draft in growing:
                if draft.finish is None and draft.request.limit is not None and draft.request.limit.reached(self.usage):
                    draft.finish = Finish.STOPPED
            growing = [draft for draft in growing if draft.finish is None]

    def _groups(self, growing: Sequence[Draft]) -> list[tuple[list[Draft], int]]:
        """Return the drafts of each request, with the most tokens that each of them may get."""
        groups: dict[tuple, tuple[list[Draft], int]] = {}
        for draft in growing:
            most = self._share(draft, len(growing))
            place = (draft.prefix, draft.request.params, draft.stops, most)
            alone = () if self.server.kind is Kind.LLAVA_COT else (id(draft),)
            groups.setdefault((*place, *alone), ([], most))[0].append(draft)
        return [*groups.values()]

    def _share(self, draft: Draft, number: int) -> int:
        """Return the most tokens that ``draft``, one of ``number``, may get now: at least one, as on the engine."""
        most, limit = draft.request.max_new_tokens - draft.count, draft.request.limit
        if limit is None:
            return most
        if limit.reached(self.usage):
            return 1
        if limit.generated_tokens is None:
            return most
        return min(most, max(1, math.ceil(limit.generated_tokens - self.usage.generated_tokens) // number))

    async def _send(self, drafts: Sequence[Draft], most: int) -> None:
        """Ask for ``most`` tokens for each of ``drafts``, which differ in their seeds alone."""
        (first, *_) = drafts
        assert self._messages is not None
        tags = self.server.tags
        stops = tags if first.stops is None else [tags[number] for number in sorted(first.stops)]
        seeds = [draft.seed for draft in drafts]
        reply = await self.server.send(self._messages, first.prefix, seeds, first.request.params, most, stops)
        self._account(reply)
        for draft, piece in zip(drafts, reply.pieces):
            draft.add(piece, most)

    def _account(self, reply: Reply) -> None:
        """Count a reply. The prompt counts once; what the server reads again and has not cached is recomputed."""
        self.usage.generated_tokens += reply.completion_tokens
        if self.prompt_tokens is None:
            self.prompt_tokens = reply.prompt_tokens
            self.usage.prompt_tokens += reply.prompt_tokens
        else:
            self.usage.recomputed_tokens += max(0, reply.prompt_tokens - reply.cached_tokens)

    def _keep(self, draft: Draft, parent: int) -> Any:
        """Return the continuation of a draft that has ended, and remember it under an id."""
        prefix, id = draft.prefix, self.next_id
        self.next_id += 1
        self.prefixes[id] = prefix
        told = [piece.tokens for piece in draft.pieces]
        if Feature.TOKEN_IDS in self.server.features:
            tokens = tuple(token for own in told if own is not None for token in own)
        else:
            tokens = self._stand_in(draft.text, draft.count)
        return draft.continuation(id, parent, tokens, self.server.tags)

    def _stand_in(self, text: str, count: int) -> tuple[int, ...]:
        if text not in self.stand_ins:
            self.stand_ins[text] = tuple(range(self.next_stand_in, self.next_stand_in + count))
            self.next_stand_in += count
        return self.stand_ins[text]
