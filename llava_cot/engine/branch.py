"""The engine's own record of a continuation: its tokens and where their keys and values are."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from llava_cot.core import Continuation, Finish

MOST_TOKENS_OF_A_CHARACTER = 8  # it has 4 bytes at most; the others may be special tokens, which add none


@dataclass(eq=False)
class Branch:
    """Tokens that follow those of ``parent``; the root holds the prompt.

    ``seq`` is its sequence in the page pool, with the keys and values of every token up to here except the last, which
    is computed when the branch grows or is expanded. ``next_logits`` [V] is kept from the first expansion on, so that
    expanding a branch again computes nothing. Where pages are scarce, the branch may be evicted: ``seq`` is -1 then,
    and its first ``computed`` tokens, counted from the start of the prompt, are recomputed when they are needed. A
    growing branch whose sibling ``twin`` has drawn the same tokens has no pages either: the twin is computed for both.
    """

    parent: "Branch | None"
    seq: int
    length: int  # tokens from the start of the prompt to here
    id: int = 0
    image: int = -1  # the image's segment in the store; -1 where image tokens are part of the prompt
    position_offset: int = 0  # from a token's index to its rotary position: M-RoPE counts an image as its longer side
    seed: int = 0
    tag_state: int | None = 0  # None until it is needed, if the tokens were given
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    sampling_logprobs: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    certainties: list[float] = field(default_factory=list)
    tag: int = -1  # the stop tag that closed
    overhang: int = 0  # bytes of the last token after that tag
    finish: Finish | None = None
    next_logits: torch.Tensor | None = None
    top: dict[int, float] = field(default_factory=dict)  # log-probs of the most likely next tokens, where asked for
    wanted: tuple[float, ...] = ()
    computed: int = 0
    twin: "Branch | None" = None
    is_released: bool = False
    _anchor: "Branch | None" = None

    def __post_init__(self) -> None:
        self._anchor = self.parent
        if self.parent is not None:
            self.position_offset = self.parent.position_offset

    def path(self) -> list[int]:
        """Every token id from the end of the prompt to here."""
        parts, branch = [], self
        while branch.parent is not None:
            parts.append(branch.tokens)
            branch = branch.parent
        return [token for tokens in reversed(parts) for token in tokens]

    def holder(self) -> "Branch | None":
        """The nearest ancestor that has not been released; the root never is. None for the root."""
        while self._anchor is not None and self._anchor.is_released:
            self._anchor = self._anchor._anchor
        return self._anchor

    def text(self, decode: Callable[[Sequence[int]], str]) -> str:
        """The text that it adds to that of its parent, which may end within a character."""
        before, branch = list[int](), self.parent
        while branch is not None and len(before) < MOST_TOKENS_OF_A_CHARACTER:
            before, branch = branch.tokens[-MOST_TOKENS_OF_A_CHARACTER:] + before, branch.parent
        return decode(before + self.tokens)[len(decode(before)) :]

    def continuation(self, decode: Callable[[Sequence[int]], str]) -> Continuation:
        """What the search gets to see."""
        return Continuation(
            self.id,
            self.parent.id if self.parent else -1,
            tuple(self.tokens),
            self.text(decode),
            tuple(self.logprobs),
            tuple(self.sampling_logprobs),
            tuple(self.entropies),
            tuple(self.certainties),
            self.finish,
            self.tag,
            self.seed,
            tuple(self.top.items()),
            self.wanted,
        )
