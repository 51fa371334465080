"""One question and the search that runs on it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from llava_cot.engine.branch import Branch, Expand, Program, Request


@dataclass
class Usage:
    """What a search cost. A search that was restarted for want of pages pays again."""

    prompt_tokens: int = 0  # tokens prefilled, those that a scorer gave to read included
    decoded_tokens: int = 0  # tokens computed after the prefill
    generated_tokens: int = 0  # tokens drawn
    generations: int = 0  # candidates drawn
    image_encodings: int = 0
    scorer_calls: int = 0  # candidates given to a scorer
    steps: int = 0  # forward passes this search took part in
    seconds: float = 0.0  # from its first prefill to its end

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
    every branch it made (they own pages until the job ends), the requests it has not opened yet, the growing branches,
    and the reply that collects them.
    """

    inputs: dict[str, torch.Tensor]
    program: Callable[[Branch], Program]
    usage: Usage = field(default_factory=Usage)
    result: Any = None
    error: Exception | None = None
    cancelled: bool = False
    branches: list[Branch] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    slots: list[Slot] = field(default_factory=list)
    _reply: list[Any] | None = None
    _failure: Exception | None = None
    _coroutine: Program | None = None
    _start: float = 0.0
    _seconds: float = 0.0  # of runs before this one

    @property
    def prompt_length(self) -> int:
        return self.inputs["input_ids"].shape[1]

    def cancel(self) -> None:
        """End it without a result at the next step, with all that it holds given back."""
        self.cancelled = True

    def start(self, root: Branch, now: float) -> None:
        self._coroutine, self._start, self._seconds = self.program(root), now, self.usage.seconds

    def tick(self, now: float) -> None:
        self.usage.seconds = self._seconds + now - self._start

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
        self.branches, self.requests, self.slots = [], [], []
        self._reply = self._failure = None
        try:
            if coroutine is not None:
                coroutine.close()
        except Exception as error:  # of its cleaning up
            self.error = self.error or error
