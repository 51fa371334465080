"""Which row has which id, in 16 bytes per row."""

from array import array
from collections.abc import Iterator
from hashlib import blake2b

import numpy as np


def id_hash(id: str) -> int:
    """A hash in [0, 2**64) that is the same in every process."""
    return int.from_bytes(blake2b(id.encode(errors="surrogatepass"), digest_size=8).digest(), "big")


class RowIndex:
    """Find rows by the hash of their id. What it finds must be compared with the id itself.

    Args:
        hashes: ``id_hash`` of every row's id, in order; at least one.
    """

    def __init__(self, hashes: "array[int]") -> None:
        values = np.frombuffer(hashes, np.uint64)
        self._order = np.argsort(values, kind="stable")
        self._sorted = values[self._order]

    def rows(self, id: str) -> list[int]:
        """The rows whose id has the hash of ``id``, in order."""
        first, last = (int(np.searchsorted(self._sorted, np.uint64(id_hash(id)), side)) for side in ("left", "right"))
        return [int(row) for row in self._order[first:last]]

    def first(self, hashes: np.ndarray) -> np.ndarray:
        """The first row with each hash, int64, and -1 where there is none."""
        places = np.minimum(np.searchsorted(self._sorted, hashes), len(self._sorted) - 1)
        return np.where(self._sorted[places] == hashes, self._order[places], -1)

    def collisions(self) -> Iterator[tuple[int, int]]:
        """Pairs of rows whose ids have one hash, each with the next such row."""
        for place in np.flatnonzero(self._sorted[1:] == self._sorted[:-1]):
            yield int(self._order[place]), int(self._order[place + 1])
