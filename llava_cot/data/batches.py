"""Assign examples to the batches of each step and rank, as a pure function of the step."""

import heapq
from collections.abc import Sequence

import numpy as np

MEGA_BATCH = 50  # batches whose examples are sorted by length together

Row = list[int]
MicroBatch = list[Row]


class BatchPlan:
    """The order of the examples and their rows, for one of several ranks.

    An epoch shows every example once. Its last batch, or one of them, may be smaller. The examples of a step are the
    same for any number of ranks, and all ranks have the same number of micro-batches in a step.

    Args:
        lengths: the number of tokens of each example.
        batch_size: examples per step, over all ranks.
        rows_per_batch: the most rows of a micro-batch.
        max_row_tokens: the most tokens of a row, which then has several examples. A longer example gets a row of its
            own. None means one example a row, with examples of similar length in a batch and a micro-batch.
        seed: the seed of the order.
        rank: the rank whose micro-batches these are, of ``world_size``.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        batch_size: int,
        rows_per_batch: int,
        max_row_tokens: int | None,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        at_least_one = {"batch_size": batch_size, "rows_per_batch": rows_per_batch, "world_size": world_size}
        if max_row_tokens is not None:
            at_least_one["max_row_tokens"] = max_row_tokens
        for name, value in at_least_one.items():
            if value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        if seed < 0:
            raise ValueError(f"seed must be >= 0, got {seed}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in [0, world_size={world_size}), got {rank}")
        self._lengths = np.asarray(lengths, dtype=np.int64)
        if not self._lengths.size or self._lengths.min() < 1:
            got = int(self._lengths.min()) if self._lengths.size else "none"
            raise ValueError(f"lengths must be at least one, each >= 1, got {got}")
        self.batch_size, self.rows_per_batch, self.max_row_tokens = batch_size, rows_per_batch, max_row_tokens
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self._latest: tuple[int, list[np.ndarray]] | None = None  # an epoch and its batches

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self._lengths) // self.batch_size)

    def batch(self, step: int) -> np.ndarray:
        """Return the examples of ``step`` over all ranks, the longest first: int64 [batch_size] or fewer."""
        if step < 0:
            raise ValueError(f"step must be >= 0, got {step}")
        epoch, index = divmod(step, self.steps_per_epoch)
        if self._latest is None or self._latest[0] != epoch:
            self._latest = epoch, self._shuffle(epoch)
        examples = self._latest[1][index]
        return examples[np.argsort(-self._lengths[examples], kind="stable")]

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """Return this rank's part of ``step``: micro-batches of at most ``rows_per_batch`` rows of example indices.

        A rank that has less to do than others gets empty rows.
        """
        examples = self.batch(step)
        if self.max_row_tokens is None:
            return self._alone(examples)
        return self._packed(examples, self.max_row_tokens)

    def _shuffle(self, epoch: int) -> list[np.ndarray]:
        """Return the batches of an epoch in order."""
        # Use raw draws, because NumPy may change how it makes permutations from them.
        random = np.random.PCG64([self.seed, epoch])
        order = np.argsort(random.random_raw(len(self._lengths)), kind="stable")
        starts = range(0, len(order), self.batch_size)
        if self.max_row_tokens is not None:
            return [order[start : start + self.batch_size] for start in starts]
        # A small data set has several mega-batches too. With only one, every epoch would have the same batches.
        size = self.batch_size * max(1, min(MEGA_BATCH, len(starts) // 4))
        megas = (order[start : start + size] for start in range(0, len(order), size))
        order = np.concatenate([mega[np.argsort(-self._lengths[mega], kind="stable")] for mega in megas])
        batches = [order[start : start + self.batch_size] for start in starts]
        return [batches[index] for index in np.argsort(random.random_raw(len(batches)), kind="stable")]

    def _alone(self, examples: np.ndarray) -> list[MicroBatch]:
        count = -(-len(examples) // (self.world_size * self.rows_per_batch))
        groups = np.array_split(examples, count * self.world_size)  # neighbours run at the same time on different ranks
        mine = groups[self.rank :: self.world_size]
        return [[[int(example)] for example in group] or [[]] for group in mine]

    def _packed(self, examples: np.ndarray, limit: int) -> list[MicroBatch]:
        parts = self._spread(examples, self.world_size)
        count = max(-(-len(self._first_fit(part, limit)) // self.rows_per_batch) for part in parts)
        mine = parts[self.rank]
        # Evenly filled rows pad the least. If one of them would be too long, use as few rows as suffice.
        rows = self._spread(mine, count * self.rows_per_batch)
        if any(self._tokens(row) > limit for row in rows if len(row) > 1):
            rows = self._first_fit(mine, limit)
        rows = sorted(filter(None, rows), key=lambda row: (-self._tokens(row), row))
        groups = (rows[start : start + self.rows_per_batch] for start in range(0, len(rows), self.rows_per_batch))
        batches = [group for group in groups if group]
        return batches + [[[]] for _ in range(count - len(batches))]

    def _spread(self, examples: Sequence[int] | np.ndarray, count: int) -> list[Row]:
        """Split into ``count`` parts of similar size: the longest example first, each into the least filled part."""
        parts: list[Row] = [[] for _ in range(count)]
        filled = [(0, index) for index in range(count)]
        for example in map(int, examples):
            tokens, index = filled[0]
            parts[index].append(example)
            heapq.heapreplace(filled, (tokens + int(self._lengths[example]), index))
        return parts

    def _first_fit(self, examples: Sequence[int], limit: int) -> list[Row]:
        """Pack rows of at most ``limit`` tokens: the longest example first, each into the first row with room."""
        rows: list[Row] = []
        room: list[int] = []
        for example in examples:
            length = int(self._lengths[example])
            index = next((index for index, free in enumerate(room) if free >= length), len(rows))
            if index == len(rows):
                rows.append([])
                room.append(limit)
            rows[index].append(example)
            room[index] -= length
        return rows

    def _tokens(self, row: Row) -> int:
        return int(self._lengths[row].sum())
