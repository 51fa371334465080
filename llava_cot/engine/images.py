"""Cross-attention keys and values: one read-only segment per image, shared by every candidate of its question."""

import torch


class ImageStore:
    """Segments of one buffer ``kv`` [2, num_cross_layers, capacity, num_kv_heads, head_dim]; it stays where it is."""

    def __init__(
        self, num_layers: int, num_kv_heads: int, head_dim: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.capacity = capacity  # tokens
        self.kv = torch.empty(2, num_layers, capacity, num_kv_heads, head_dim, dtype=dtype, device=device)
        self._segments: dict[int, int] = {}  # start -> end
        self._bounds = [0]  # of the segments and of the gaps between them
        self._groups = {-1: -1, 0: 0}  # by start
        self._cu_seqlens: torch.Tensor | None = None

    def starts(self) -> list[int]:
        """The segments in use, by their start."""
        return list(self._segments)

    def has_room(self, length: int) -> bool:
        """Whether segments of ``length`` tokens together can be added."""
        return self._first_fit(length) + length <= self.capacity

    def add(self, key_value: torch.Tensor) -> int:
        """Copy ``key_value`` [2, num_cross_layers, S, num_kv_heads, head_dim] in; returns the segment's start."""
        length = key_value.shape[2]
        assert self.has_room(length)
        start = self._first_fit(length)
        self.kv[:, :, start : start + length] = key_value
        self._segments[start] = start + length
        self._note_bounds()
        return start

    def free(self, start: int) -> None:
        del self._segments[start]
        self._note_bounds()

    def layout(self, starts: list[int]) -> tuple[list[int], list[int]]:
        """(group of each start, bounds of the groups): free gaps count as groups that nobody reads.

        The group of a start of -1, which is no image, is -1.
        """
        return [self._groups[start] for start in starts], self._bounds

    def segments(self, starts: list[int]) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """As ``layout``, on the device: (group [len(starts)] int32, cu_seqlens [G + 1] int64).

        (None, None) for a model without cross-attention, which stores nothing.
        """
        if not self.kv.shape[1]:
            return None, None
        groups, bounds = self.layout(starts)
        if self._cu_seqlens is None:
            self._cu_seqlens = torch.tensor(bounds, device=self.kv.device)
        return torch.tensor(groups, dtype=torch.int32, device=self.kv.device), self._cu_seqlens

    def _note_bounds(self) -> None:
        self._bounds = sorted({0, *self._segments, *self._segments.values()})
        self._groups = {-1: -1} | {start: group for group, start in enumerate(self._bounds)}
        self._cu_seqlens = None

    def _first_fit(self, length: int) -> int:
        start = 0
        for used_start, used_end in sorted(self._segments.items()):
            if used_start - start >= length:
                break
            start = used_end
        return start
