"""Parquet files as Hugging Face datasets have them. Needs pyarrow, which is imported when it is used."""

from bisect import bisect_right
from collections.abc import Collection, Iterator, Sequence
from hashlib import md5
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_cot.evaluate.files.table import Row, Table

if TYPE_CHECKING:
    import pyarrow as pa

BATCH = 16  # rows that a scan holds at once, since each may have an image
KEPT = 2  # row groups in memory: one with images and one without
CHUNK = 1 << 20  # bytes


class Parquet(Table):
    """The rows of one parquet file, or of several with the same columns. A row group is read when a row of it is."""

    def __init__(self, path: Path, shards: Sequence[Path]) -> None:
        try:
            import pyarrow.parquet as pq
        except ImportError:
            raise ValueError(f"{path}: parquet needs pyarrow: pip install 'llava-cot[evaluate]'") from None
        self.path = path
        self._shards = tuple(shards)
        self._groups: list[tuple[Path, int]] = []
        self._starts: list[int] = []  # the first row of each group
        self._rows = 0
        self._kept: dict[tuple[int, tuple[str, ...] | None], pa.Table] = {}
        for shard in shards:
            file = _opened(pq, shard)
            names = tuple(file.schema_arrow.names)
            if shard == shards[0]:
                self.columns = names
            elif names != self.columns:
                raise ValueError(f"{shard}: its columns must be those of {shards[0].name}, got {list(names)}")
            for group in range(file.metadata.num_row_groups):
                self._groups.append((shard, group))
                self._starts.append(self._rows)
                self._rows += file.metadata.row_group(group).num_rows

    def scan(self) -> Iterator[Row]:
        import pyarrow.parquet as pq

        number = 0
        self._begin(self._shards)
        for shard in self._shards:
            try:
                for batch in _opened(pq, shard).iter_batches(BATCH):
                    yield from batch.to_pylist()
                    number += len(batch)
            except (OSError, ValueError) as error:  # pyarrow's errors are one or the other
                raise self.error(number, f"its page can't be read: {error}") from None
        digest = md5(usedforsecurity=False)
        for shard in self._shards:
            with open(shard, "rb") as file:
                while chunk := file.read(CHUNK):
                    digest.update(chunk)
        self.md5 = digest.hexdigest()

    def __len__(self) -> int:
        return self._rows

    def row(self, number: int, columns: Collection[str] | None = None) -> Row:
        if not 0 <= number < len(self):
            raise IndexError(f"number must be in [0, {len(self)}), got {number}")
        group = bisect_right(self._starts, number) - 1
        wanted = None if columns is None else tuple(name for name in self.columns if name in columns)
        if wanted == ():
            return {}
        rows: list[dict[str, Any]] = self._group(group, wanted).slice(number - self._starts[group], 1).to_pylist()
        return rows[0]

    def _group(self, group: int, columns: tuple[str, ...] | None) -> "pa.Table":
        import pyarrow.parquet as pq

        found = self._kept.get((group, columns))
        if found is None:
            shard, place = self._groups[group]
            with self._as_scanned():
                found = _opened(pq, shard).read_row_group(place, columns)
            self._kept = dict([*self._kept.items()][1 - KEPT :]) | {(group, columns): found}
        return found

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": {}}  # a worker reads the file itself


def _opened(pq: Any, shard: Path) -> Any:
    try:
        return pq.ParquetFile(shard)
    except (OSError, ValueError) as error:
        raise ValueError(f"{shard}: it must be a whole parquet file: {error}") from None
