"""The vocabulary between a search program and the engine: branches of tokens, and requests to grow them."""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import torch


class Finish(StrEnum):
    """Why a branch stopped growing."""

    TAG = "tag"  # a stop tag closed
    EOS = "eos"
    LENGTH = "length"  # max_new_tokens
    STOPPED = "stopped"  # its request said so


@dataclass(frozen=True)
class SamplingParams:
    """As in transformers' ``GenerationConfig``; ``temperature`` 0 is argmax, ``top_k`` 0 is off."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self):
        for name, ok, bound in (
            ("temperature", self.temperature >= 0, ">= 0"),
            ("top_k", self.top_k >= 0, ">= 0"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("min_p", 0 <= self.min_p <= 1, "in [0, 1]"),
        ):
            if not ok:
                raise ValueError(f"{name} must be {bound}, got {getattr(self, name)}")


@dataclass(eq=False)
class Branch:
    """Tokens sampled in a row under one seed, after those of ``parent``; the root holds the prompt.

    ``seq`` is its sequence in the page pool: the keys and values of every token up to here but the last, which is
    computed when the branch grows or is expanded. ``next_logits`` [V] is kept from the first expansion on, so that
    expanding a branch again computes nothing. Where pages are scarce those may be taken back, of ``computed`` tokens
    (``seq`` is -1 then): they are computed again when they are needed.
    """

    parent: "Branch | None"
    seq: int
    length: int  # tokens from the start of the prompt to here
    image: int = -1  # the image's segment in the store; -1 where image tokens are part of the prompt
    position_offset: int = 0  # from a token's index to its rotary position: M-RoPE counts less for an image
    seed: int = 0
    tag_state: int = 0
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)  # under the model, nats
    sampling_logprobs: list[float] = field(default_factory=list)  # under the filtered distribution drawn from, nats
    entropies: list[float] = field(default_factory=list)  # nats
    certainties: list[float] = field(default_factory=list)  # KL(uniform, the model's distribution), nats
    tag: int = -1  # the stop tag that closed
    overhang: int = 0  # bytes of the last token behind that tag
    finish: Finish | None = None
    next_logits: torch.Tensor | None = None
    computed: int = 0

    def __post_init__(self):
        if self.parent is not None:
            self.position_offset = self.parent.position_offset

    def path(self) -> list[int]:
        """Every token id from the end of the prompt to here."""
        return [*(self.parent.path() if self.parent else ()), *self.tokens]


@dataclass(frozen=True)
class Expand:
    """A request: grow one new branch from ``parent`` per seed, each until it finishes.

    ``stops`` are the numbers of the tags that end a branch, None all of them. A tag in ``trims`` ends it too, and a
    token that goes on behind such a tag is taken back. ``stop`` is asked after every step; once true, it ends them all.
    """

    parent: Branch
    seeds: tuple[int, ...]
    params: SamplingParams
    max_new_tokens: int  # per branch
    stops: frozenset[int] | None = None
    trims: frozenset[int] = frozenset()
    stop: Callable[[], bool] | None = None

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be >= 1, got {self.max_new_tokens}")

    @property
    def width(self) -> int:
        return len(self.seeds)


@dataclass(frozen=True, eq=False)
class Rank:
    """A request: the ``k`` most likely next tokens of ``parent``, or of its ``children``.

    A child is what ``parent`` has and one more token, given with its log-prob. Children take the place and the pages of
    ``parent``, unless that is the root: with none, it is dropped. ``children`` None ranks ``parent`` itself.
    """

    parent: Branch
    k: int
    children: tuple[tuple[int, float], ...] | None = None

    def __post_init__(self):
        if self.k < 1:
            raise ValueError(f"k must be >= 1, got {self.k}")

    @property
    def width(self) -> int:
        return 1 if self.children is None else len(self.children)


@dataclass(frozen=True, eq=False)
class Ranked:
    """The reply to ``Rank``, one for each child: its next tokens, the most likely first, and their log-probs (nats)."""

    branch: Branch
    tokens: list[int]
    logprobs: list[float]


@dataclass(frozen=True, eq=False)
class Extend:
    """A request: the branch of ``parent`` and these ``tokens``, which it did not draw.

    It is computed at once, beside all others and on the pages of ``parent``; its reply has the tokens' log-probs and
    ``next_logits``.
    """

    parent: Branch
    tokens: tuple[int, ...]

    def __post_init__(self):
        if not self.tokens:
            raise ValueError("tokens must not be empty, got ()")

    @property
    def width(self) -> int:
        return 1


@dataclass(frozen=True, eq=False)
class Call:
    """A request: ``function(items)``, one result for each item.

    The calls of equal functions that several searches ask for in one step are made as one. What it raises is raised in
    the search that asked.
    """

    function: Callable[[list[Any]], Sequence[Any]]
    items: Sequence[Any]

    @property
    def width(self) -> int:
        return 0


Request = Expand | Rank | Extend | Call

# A search as a coroutine: it yields what it wants next and is sent a reply per request: the finished branches of an
# Expand, the ranked children of a Rank, the branch of an Extend (in a list), the results of a Call.
Program = Generator[list[Request], list[list[Any]], Any]
