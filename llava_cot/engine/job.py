"""One question and the search that runs on it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from llava_cot.engine.branch import Branch, Call, Expand, Program, Request


@dataclass
class Usage:
    """What a search cost. What is computed again for want of pages counts as that alone."""

    prompt_tokens: int = 0  # tokens prefilled, those that a scorer gave to read included
    recomputed_tokens: int = 0  # computed again, as their pages had been taken back
    decoded_tokens: int = 0  # tokens computed after the prefill
    generated_tokens: int = 0  # tokens drawn
    generations: int = 0  # candidates drawn
    image_encodings: int = 0
    scorer_calls: int = 0  # candidates given to a scorer
    steps: int = 0  # forward passes this search took part in
    seconds: float = 0.0  # from its start to its end, pauses left out

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(*(a + b for a, b in zip(vars(self).values(), vars(other).values())))

    def __sub__(self, other: "Usage") -> "Usage":
        return Usage(*(a - b for a, b in zip(vars(self).values(), vars(other).values())))


@dataclass(eq=False)
class Slot:
    """A growing branch and the request it answers."""

    branch: Branch
    request: Expand


@dataclass(eq=False)
class Job:
    """``inputs`` are the processor's for one sample, without padding.

    ``result`` is what the program returned; if it failed, ``error`` is what it raised. The engine fills the rest:
    every branch it made, the root first (they own pages until the job ends, or others need them more), the requests it
    has not opened yet with what is known of their answers, the growing branches, and the reply that collects them.
    """

    inputs: dict[str, torch.Tensor]
    program: Callable[[Branch], Program]
    usage: Usage = field(default_factory=Usage)
    result: Any = None
    error: Exception | None = None
    cancelled: bool = False
    branches: list[Branch] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    answers: dict[Request, Any] = field(default_factory=dict)
    slots: list[Slot] = field(default_factory=list)
    _reply: list[Any] | None = None
    _failure: Exception | None = None
    _coroutine: Program | None = None
    was_paused: bool = False
    _since: float = 0.0  # its seconds are counted up to here

    @property
    def prompt_length(self) -> int:
        return self.inputs["input_ids"].shape[1]

    def cancel(self) -> None:
        """End it without a result at the next step, with all that it holds given back."""
        self.cancelled = True

    @property
    def width(self) -> int:
        """How many branches grow, or will once its requests are opened."""
        return len(self.slots) + sum(request.width for request in self.requests)

    def start(self, root: Branch, now: float) -> None:
        self.branches, self._coroutine = [root], self.program(root)
        self.resume(now)

    def resume(self, now: float) -> None:
        """Count its seconds from here on."""
        self._since = now

    def tick(self, now: float) -> None:
        self.usage.seconds += now - self._since
        self._since = now

    def active(self) -> list[Branch]:
        """What is computed or forked next."""
        found = [slot.branch for slot in self.slots]
        for request in self.requests:
            if not isinstance(request, Call):
                found += self.answers.get(request, [request.parent])
        return found

    def idle(self) -> list[Branch]:
        """What has pages, is not active, and no active branch hangs on it."""
        needed = set[Branch]()
        for branch in self.active():
            above: Branch | None = branch
            while above is not None and above not in needed:
                needed.add(above)
                above = above.parent
        return [branch for branch in self.branches[1:] if branch.seq >= 0 and branch not in needed]

    def open(self, request: Expand, kids: list[Branch]) -> None:
        """Note that ``kids`` now grow to answer ``request``."""
        self.reply(kids)
        self.slots += [Slot(kid, request) for kid in kids]

    def reply(self, answer: list[Any]) -> None:
        """Answer the next request: all are answered in their order."""
        assert self._reply is not None
        self._reply.append(answer)

    def fail(self, error: Exception) -> None:
        """Answer the next request with ``error``, which is raised where the program waits."""
        self._failure = error
        self.reply([])

    def advance(self, now: float) -> bool:
        """Once nothing grows, send the finished branches and take the next requests; False when the program is done."""
        assert self._coroutine is not None
        self.tick(now)
        while not self.slots and not self.requests:
            failure, self._failure = self._failure, None
            try:
                self.requests = list(
                    self._coroutine.throw(failure) if failure else self._coroutine.send(self._reply)  # type: ignore
                )
            except StopIteration as stop:
                self.result = stop.value
                return False
            except Exception as error:
                self.error = error
                return False
            self._reply = []
        return True

    def reset(self) -> None:
        """Forget all progress; the pages it owned are the engine's to free."""
        for branch in self.branches:
            branch.next_logits = None
        coroutine, self._coroutine = self._coroutine, None
        self.branches, self.requests, self.answers, self.slots = [], [], {}, []
        self.was_paused = False
        self._reply = self._failure = None
        try:
            if coroutine is not None:
                coroutine.close()
        except Exception as error:  # of its cleaning up
            self.error = self.error or error
