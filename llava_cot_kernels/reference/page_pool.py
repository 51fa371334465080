"""The page pool in plain Python. It defines the correct behaviour and is not used at run time."""

from collections.abc import Sequence

import torch

try:
    from llava_cot_kernels._C import OutOfPages  # both pools raise the same class
except ImportError:  # the extension is not built

    class OutOfPages(RuntimeError):  # type: ignore[no-redef]
        """Raised when fewer pages are free than an append needs."""


class PagePool:
    """Store forkable sequences in ``num_pages`` pages of ``page_size`` tokens; see ``llava_cot_kernels.PagePool``."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        if not 0 <= num_pages < 2**31 or not 1 <= page_size < 2**31:
            raise ValueError(
                f"num_pages must be in [0, 2**31 - 1] and page_size in [1, 2**31 - 1], got {num_pages} and {page_size}"
            )
        self.num_pages = num_pages
        self.page_size = page_size
        self._free = list(reversed(range(num_pages)))  # a stack: the page freed last is the warmest
        self._ref_count = [0] * num_pages
        self._pages: dict[int, list[int]] = {}
        self._length: dict[int, int] = {}
        self._next = 0

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_sequences(self) -> int:
        return len(self._pages)

    def sequences(self) -> list[int]:
        return sorted(self._pages)

    def create(self) -> int:
        seq = self._next
        self._next += 1
        self._pages[seq], self._length[seq] = [], 0
        return seq

    def fork(self, seq: int, n: int) -> list[int]:
        self._check(seq)
        if n < 0:
            raise ValueError(f"n must be >= 0, got {n}")
        kids = [self.create() for _ in range(n)]
        for kid in kids:
            self._pages[kid], self._length[kid] = self._pages[seq].copy(), self._length[seq]
            for page in self._pages[seq]:
                self._ref_count[page] += 1
        return kids

    def append(self, seqs: Sequence[int], counts: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        if len(seqs) != len(counts):
            raise ValueError(f"counts must have one entry per sequence, {len(seqs)}, got {len(counts)}")
        for i, (seq, count) in enumerate(zip(seqs, counts)):
            self._check(seq)
            if count < 0:
                raise ValueError(f"counts must be >= 0, got {count}")
            if seq in seqs[:i]:
                raise ValueError(f"seqs must not repeat a sequence, got {seq} twice")
        needed = self._pages_needed(seqs, counts)
        if needed > self.num_free:
            raise OutOfPages(f"append needs {needed} pages, {self.num_free} are free")
        slots, copies = [], []
        for seq, count in zip(seqs, counts):
            pages = self._pages[seq]
            if count and self._length[seq] % self.page_size and self._ref_count[pages[-1]] > 1:
                source, target = pages[-1], self._take()
                self._ref_count[source] -= 1
                pages[-1] = target
                copies.append((source, target))
            for position in range(self._length[seq], self._length[seq] + count):
                if position == len(pages) * self.page_size:
                    pages.append(self._take())
                slots.append(pages[position // self.page_size] * self.page_size + position % self.page_size)
            self._length[seq] += count
        return torch.tensor(slots, dtype=torch.int64), torch.tensor(copies, dtype=torch.int32).reshape(-1, 2)

    def truncate(self, seq: int, length: int) -> None:
        self._check(seq)
        if not 0 <= length <= self._length[seq]:
            raise ValueError(f"length must be in [0, {self._length[seq]}], got {length}")
        self._length[seq] = length
        while len(self._pages[seq]) > -(-length // self.page_size):
            self._drop(self._pages[seq].pop())

    def free(self, seq: int) -> None:
        self.truncate(seq, 0)
        del self._pages[seq], self._length[seq]

    def page_table(self, seqs: Sequence[int], out: torch.Tensor | None = None) -> torch.Tensor:
        rows = [self._pages[self._check(seq)] for seq in seqs]
        if out is None:
            out = torch.empty(len(rows), max(1, *map(len, rows)) if rows else 1, dtype=torch.int32)
        out.zero_()
        for entries, pages in zip(out, rows):
            entries[: len(pages)] = torch.tensor(pages, dtype=torch.int32)
        return out

    def length(self, seq: int) -> int:
        return self._length[self._check(seq)]

    def ref_count(self, page: int) -> int:
        if not 0 <= page < self.num_pages:
            raise ValueError(f"page must be in [0, {self.num_pages - 1}], got {page}")
        return self._ref_count[page]

    def _check(self, seq: int) -> int:
        if seq not in self._pages:
            raise KeyError(f"sequence {seq} is freed or unknown")
        return seq

    def _pages_needed(self, seqs: Sequence[int], counts: Sequence[int]) -> int:
        """Return how many pages an append takes, including copies of shared partial pages.

        The last of k sharers of a partial page writes in place only if no sequence outside ``seqs`` holds the page.
        """
        needed, copied = 0, [0] * self.num_pages
        for seq, count in zip(seqs, counts):
            pages, length = self._pages[seq], self._length[seq]
            needed += max(0, -(-(length + count) // self.page_size) - len(pages))
            if count and length % self.page_size and self._ref_count[pages[-1]] - copied[pages[-1]] > 1:
                copied[pages[-1]] += 1
                needed += 1
        return needed

    def _take(self) -> int:
        page = self._free.pop()
        self._ref_count[page] = 1
        return page

    def _drop(self, page: int) -> None:
        self._ref_count[page] -= 1
        if self._ref_count[page] == 0:
            self._free.append(page)
