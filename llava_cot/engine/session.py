"""One prompt in the engine: the session that its owner holds, and the job that the schedule runs for it."""

import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch

from llava_cot.core import Call, Expand, Extend, Release, Replies, Request, Usage
from llava_cot.engine.branch import Branch
from llava_cot.engine.history import History

if TYPE_CHECKING:
    from llava_cot.engine.engine import Engine


@dataclass(eq=False)
class Slot:
    """A growing branch and the request it answers. ``reach`` is how many tokens are drafted for it at once."""

    branch: Branch
    request: Expand
    reach: int = 1


@dataclass(eq=False)
class Extension:
    """A branch of given tokens, as it was forked from its parent, which may be released before it is computed.

    ``unread`` are the tokens that are computed for it, int ids. They include the last token of its parent if nobody had
    computed that yet; ``first_logits`` [V] is None then.
    """

    request: Extend
    branch: Branch
    unread: list[int]
    first_logits: torch.Tensor | None
    top: dict[int, float]  # that of the parent

    @property
    def is_spoilt(self) -> bool:
        """Whether a log-prob that was read for it is NaN."""
        return any(math.isnan(x) for x in (*self.branch.logprobs, *self.branch.top.values(), *self.branch.wanted))


@dataclass(eq=False)
class Pending:
    """A request that has not been answered yet, and how far it has come."""

    request: Request
    parent: Branch | None = None
    extension: Extension | None = None  # of an Extend, once it has been forked
    answer: Any = None  # of a Call or a Release, once there is one

    @property
    def width(self) -> int:
        """How many branches it makes."""
        if isinstance(self.request, Expand):
            return len(self.request.seeds)
        return int(isinstance(self.request, Extend))


@dataclass(eq=False)
class Job:
    """``prepare`` makes ``inputs``, the processor's for one sample without padding, once there is room for them.

    ``branches`` own pages until they are released, the job ends, or others need the pages more; the root comes first.
    ``pending`` are the requests that have not been opened yet, ``slots`` the growing branches.
    """

    prepare: Callable[[], dict[str, torch.Tensor]] | None
    root: Branch
    inputs: dict[str, torch.Tensor] | None = None
    usage: Usage = field(default_factory=Usage)
    branches: list[Branch] = field(default_factory=list)
    by_id: dict[int, Branch] = field(default_factory=dict)
    pending: list[Pending] = field(default_factory=list)
    slots: list[Slot] = field(default_factory=list)
    history: History | None = None  # made when it is needed
    error: Exception | None = None
    is_over: bool = False
    is_started: bool = False
    is_calling: bool = False  # a function of one of its ``Call``s runs now
    was_paused: bool = False
    rebuilt_at: int = -1  # the step at which all of its branches were evicted to be restored together
    owner: "weakref.ref[Session] | None" = None
    _reply: list[Any] | None = None  # of the requests that are opened or answered, in their order
    _since: float = 0.0  # its seconds are counted up to here

    def __post_init__(self) -> None:
        self.branches, self.by_id = [self.root], {0: self.root}

    def load(self) -> dict[str, torch.Tensor]:
        """Return ``inputs``, which are made now if they have not been. Raises whatever ``prepare`` raises."""
        if self.inputs is None:
            assert self.prepare is not None
            self.inputs = self.prepare()
            self.root.length = self.inputs["input_ids"].shape[1]
        return self.inputs

    @property
    def width(self) -> int:
        """How many branches grow, or will once its requests are opened."""
        return len(self.slots) + sum(pending.width for pending in self.pending)

    @property
    def is_ready(self) -> bool:
        """Whether everything that was asked for is there, so that its owner is to be told."""
        return self.error is not None or (self._reply is not None and not (self.slots or self.pending))

    @property
    def has_work(self) -> bool:
        return bool(self.slots or self.pending) or self.is_ready

    @property
    def is_runnable(self) -> bool:
        """Whether a step has something to do for it. A step inside of its own ``Call`` has not."""
        return self.has_work and not self.is_calling

    def resume(self, now: float) -> None:
        """Count its seconds from here on."""
        self._since = now

    def tick(self, now: float) -> None:
        self.usage.seconds += now - self._since
        self._since = now

    def ask(self, pending: list[Pending]) -> None:
        self.pending, self._reply = pending, []

    def add(self, branch: Branch) -> Branch:
        """Take over a new branch, under an id of its own."""
        branch.id = len(self.by_id)
        self.by_id[branch.id] = branch
        self.branches.append(branch)
        return branch

    def active(self) -> list[Branch]:
        """What is computed or forked next."""
        waiting = [p.extension.branch if p.extension else p.parent for p in self.pending]
        growing = [slot.branch for slot in self.slots if slot.branch.twin is None]
        return growing + [branch for branch in waiting if branch is not None]

    def idle(self) -> list[Branch]:
        """Evictable branches: resident, and not an ancestor of an active one."""
        needed = set[Branch]()
        for branch in self.active():
            ancestor: Branch | None = branch
            while ancestor is not None and ancestor not in needed:
                needed.add(ancestor)
                ancestor = ancestor.parent
        return [branch for branch in self.branches[1:] if branch.seq >= 0 and branch not in needed]

    def open(self, request: Expand, kids: list[Branch]) -> None:
        """Note that ``kids`` now grow to answer ``request``."""
        self.reply(kids)
        self.slots += [Slot(kid, request) for kid in kids]

    def reply(self, answer: Any) -> None:
        """Answer the next request: all are answered in their order."""
        assert self._reply is not None
        self._reply.append(answer)

    def take_replies(self, decode: Callable[[Sequence[int]], str]) -> Replies:
        """What to tell its owner; nothing is asked afterwards."""
        reply, self._reply = self._reply, None
        error, self.error = self.error, None
        if error is not None:
            self.slots, self.pending = [], []
            return error
        return [part if isinstance(part, Exception) else [_plain(x, decode) for x in part] for part in reply or ()]

    def drop(self) -> None:
        """Forget everything that it holds; the pages are the schedule's to free."""
        for branch in self.branches:
            branch.next_logits = None
        self.branches, self.pending, self.slots, self.is_over = [], [], [], True
        self.prepare = self.inputs = self.history = None


def _plain(found: Any, decode: Callable[[Sequence[int]], str]) -> Any:
    return found.continuation(decode) if isinstance(found, Branch) else found


class Session:
    """What ``Engine.open`` returns, and ``llava_cot.core.Session`` describes.

    The engine holds it weakly. When its owner has let go of it, its work ends and its pages are given back.
    """

    def __init__(self, engine: "Engine", job: Job) -> None:
        self._engine, self._job = engine, job
        self.root, self.usage = 0, job.usage
        self._done: Any = None
        self._failure: Exception | None = None  # that ended it while nobody waited for an answer
        job.owner = weakref.ref(self)

    def ask(self, requests: Sequence[Request], done: Callable[[Replies], None]) -> None:
        """See ``llava_cot.core.Session.ask``. ``done`` runs in the thread that steps the engine."""
        if self._job.is_over:
            raise ValueError("the session must be open to be asked, but it has been closed") from self._failure
        if self._job.has_work:
            raise ValueError("the session must have answered before it is asked again")
        pending = [self._checked(request) for request in requests]
        # A bound method is held weakly: its object holds the session, and the two would keep each other alive.
        self._done = weakref.WeakMethod(done) if isinstance(done, MethodType) else lambda: done
        self._job.ask(pending)
        self._engine.take_in(self._job)

    def close(self) -> None:
        """See ``llava_cot.core.Session.close``. Its pages are given back now, or at the end of a running step."""
        self._job.is_over = True
        self._engine.collect()

    @property
    def prompt_tokens(self) -> int:
        """See ``llava_cot.core.Session.prompt_tokens``."""
        return self._job.root.length

    @property
    def growing(self) -> list[tuple[int, ...]]:
        """See ``llava_cot.core.Session.growing``."""
        return [tuple(slot.branch.path()) for slot in self._job.slots]

    def tell(self, replies: Replies) -> None:
        """Pass ``replies`` on to whoever asked."""
        done, self._done = self._done, None
        if done is not None and (call := done()) is not None:
            call(replies)
        elif isinstance(replies, Exception):
            self._failure = replies

    def _checked(self, request: Request) -> Pending:
        """Raise for what would fail a whole step, and so other sessions."""
        if not isinstance(request, Request):
            raise TypeError(f"a program must yield requests, got {request!r}")
        if isinstance(request, Call):
            return Pending(request)
        if isinstance(request, Release):
            for id in request.ids:
                self._branch(id, "ids")
                if id == self.root:
                    raise ValueError("ids must not name the prompt, which lives as long as the session")
            return Pending(request)
        if isinstance(request, Extend):
            size = self._engine.view.vocab_size
            unknown = [token for token in (*request.tokens, *request.want) if not 0 <= token < size]
            if unknown:
                name = "tokens" if unknown[0] in request.tokens else "want"
                raise ValueError(f"{name} must be in [0, vocab_size={size}), got {unknown[0]}")
        return Pending(request, self._branch(request.parent, "parent"))

    def _branch(self, id: int, name: str) -> Branch:
        branch = self._job.by_id.get(id)
        if branch is None or branch.is_released:
            raise ValueError(f"{name} must name a continuation of this session that has not been released, got {id!r}")
        return branch
