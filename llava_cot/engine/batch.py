"""What one forward pass needs to know, built once per step and passed as an argument."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from llava_cot.engine.branch import Branch


class Masks(dict[int, torch.Tensor | None]):
    """The masks of a prefill by the window of a layer, made by ``make`` when a layer first asks for one.

    They are bool [B, 1, T, T]. None means causal attention within the window.
    """

    def __init__(self, make: Callable[[int], torch.Tensor | None]) -> None:
        super().__init__()
        self._make = make

    def __missing__(self, window: int) -> torch.Tensor | None:
        self[window] = self._make(window)
        return self[window]


@dataclass(frozen=True)
class Trail:
    """What the canary follows through the passes of B sequences; see ``Canary``."""

    words: torch.Tensor  # [B] int64, of the last token of each sequence: before a pass, and then behind it
    is_broken: torch.Tensor  # [B] bool, whether a wrong word was read; a pass sets it and never clears it

    @classmethod
    def behind(cls, words: torch.Tensor) -> "Trail":
        return cls(words, torch.zeros_like(words, dtype=torch.bool))


@dataclass(frozen=True)
class Batch:
    """T tokens, filled by the runner and read by the cache and the attention.

    Decoding takes those of B sequences flattened to one row. A prefill has whole prompts with their images, padded on
    the right to one length and flattened: all keys are at hand, and it has only ``slot_mapping`` and ``masks``.
    """

    slot_mapping: torch.Tensor  # [T] int64, where each token's key and value go; -1: nowhere
    page_table: torch.Tensor | None = None  # [B, max_pages] int32
    seq_lens: torch.Tensor | None = None  # [B] int32, keys per sequence, this step's included
    cu_seqlens_q: torch.Tensor | None = None  # [B + 1] int32, where the tokens of each sequence start
    prefix_group: torch.Tensor | None = None  # [B] int32, sequences that share their first tokens; None where none do
    prefix_lens: torch.Tensor | None = None  # [P] int32, how many
    image_group: torch.Tensor | None = None  # [T] int32, the image segment of each token; None where none is stored
    image_cu_seqlens: torch.Tensor | None = None  # [G + 1] int64, the segments of the store; None where none is stored
    has_blind_rows: bool = False  # whether the image group of some rows is -1: they must pass cross-attention unchanged
    masks: Masks | None = None  # of a prefill
    trail: Trail | None = None  # of a pass that reads pages, where the canary is on

    @property
    def is_prefill(self) -> bool:
        return self.page_table is None

    @property
    def is_step(self) -> bool:
        """Whether it decodes one token of each sequence."""
        return self.seq_lens is not None and len(self.seq_lens) == len(self.slot_mapping)


def has_blind_rows(branches: Iterable[Branch], image_group: torch.Tensor | None) -> bool:
    """Whether one of ``branches`` has no image, in a model that stores images."""
    return image_group is not None and any(branch.image < 0 for branch in branches)


def shared_prefixes(branches: Sequence[Branch]) -> tuple[list[int], list[int]]:
    """(group of each branch, tokens that those of a group share): branches share the path of a common ancestor.

    That ancestor is the nearest one that has not been released. There are no lengths where no two have one in common.
    """
    groups: dict[Branch | None, int] = {}
    group = [groups.setdefault(branch.holder(), len(groups)) for branch in branches]
    if len(groups) == len(branches):
        return group, []
    return group, [ancestor.length if ancestor else 0 for ancestor in groups]
