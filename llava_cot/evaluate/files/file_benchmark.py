"""A benchmark that is read from a file: columns, ids, image pointers and the checks that all such files share."""

from abc import abstractmethod
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from llava_cot.evaluate.benchmark import Benchmark, Dataset
from llava_cot.evaluate.files.image_cells import IMAGE_COLUMNS, image_cells, image_of, pointer_of
from llava_cot.evaluate.files.known_files import KNOWN_FILES
from llava_cot.evaluate.files.row_index import RowIndex, id_hash
from llava_cot.evaluate.files.table import Row, open_table
from llava_cot.evaluate.question import Question

if TYPE_CHECKING:
    from llava_cot.image import ImageLike

WITHOUT, OWN, POINTER = range(3)  # where the image of a row is


class FileBenchmark(Benchmark):
    """A benchmark that reads a table (``open_table``). A subclass says which columns it needs and what a row means.

    The file is scanned once. Of each row the byte it starts at, a hash of its id and where its image is stay in memory.
    """

    layouts: ClassVar[Mapping[str, tuple[str, ...]]]  # the columns that each known form of the file must have
    published_rows: ClassVar[tuple[int, ...]] = ()  # of each published file whose size is known

    def __init__(self, path: Path | str | None, *, allow_partial: bool = False) -> None:
        if path is None:
            raise ValueError(f"data must be the file of {self.title}, got none")
        self._table = open_table(path)
        self.layout = self._layout_of(self._table.columns)
        self._text_columns = frozenset(self._table.columns) - frozenset(IMAGE_COLUMNS)
        self._image_kinds = bytearray()
        self._scan()
        self.dataset = self._describe(allow_partial)
        if self.known is None:
            self.check()

    @abstractmethod
    def read(self, row: Row, number: int) -> Question:
        """The question of a row, of which the image columns may be missing.

        Raises:
            ValueError: the row is wrong. The message says how; the file and the row are added to it.
        """

    def visit(self, question: Question) -> None:
        """Look at each question once, in order, to remember what ``check`` needs."""

    def check(self) -> None:
        """Check what only all rows together can show.

        Raises:
            ValueError: something is missing. The message names the file and what.
        """

    def needs_image(self, question: Question) -> bool:
        """Whether a row without an image is refused."""
        return True

    def counted(self) -> int:
        """How many rows the published size counts."""
        return len(self)

    def notes(self) -> tuple[str, ...]:
        """What a reader of the result has to know about the file, in full sentences."""
        return ()

    def __len__(self) -> int:
        return len(self._table)

    def question(self, number: int) -> Question:
        return self.read(self._table.row(number, self._text_columns), number)

    def images(self, number: int) -> "tuple[ImageLike, ...]":
        """The images of row ``number``.

        Raises:
            ValueError: an image is not base64, or its file is missing. The message names the file and the row.
        """
        cells = self._image_cells(number)
        pointer = pointer_of(cells)
        if pointer is not None:
            cells = self._image_cells(self.number_of(pointer))
        folder = self._table.path if self._table.path.is_dir() else self._table.path.parent
        try:
            return tuple(image_of(cell, folder) for cell in cells)
        except ValueError as error:
            raise self._table.error(number, error) from None

    def number_of(self, id: str) -> int:
        for number in self._index.rows(id):
            if self.question(number).id == id:
                return number
        raise KeyError(id)

    def _image_cells(self, number: int) -> list[Any]:
        return image_cells(self._table.row(number, IMAGE_COLUMNS))

    def _layout_of(self, columns: tuple[str, ...]) -> str:
        missing = {name: [key for key in needed if key not in columns] for name, needed in self.layouts.items()}
        nearest = min(missing, key=lambda name: len(missing[name]))
        if missing[nearest]:
            forms = "; ".join(f"{name}: {', '.join(needed)}" for name, needed in self.layouts.items())
            raise ValueError(
                f"{self._table.path}: it lacks the columns {missing[nearest]} of {self.title} ({forms}). "
                f"It has {list(columns)}"
            )
        return nearest

    def _scan(self) -> None:
        ids, pointing, targets = array("Q"), array("q"), array("Q")
        for number, row in enumerate(self._table.scan()):
            try:
                question = self.read(row, number)
                cells = image_cells(row)
                if not cells and self.needs_image(question):
                    raise ValueError("it has no image")
                self.visit(question)
            except ValueError as error:
                raise self._table.error(number, error) from None
            pointer = pointer_of(cells)
            if pointer is not None:
                pointing.append(number)
                targets.append(id_hash(pointer))
            self._image_kinds.append(WITHOUT if not cells else OWN if pointer is None else POINTER)
            ids.append(id_hash(question.id))
        if not ids:
            raise ValueError(f"{self._table.path}: it has no rows")
        self._index = RowIndex(ids)
        self._refuse_duplicates()
        self._refuse_dangling(np.asarray(pointing), np.asarray(targets, np.uint64))

    def _refuse_duplicates(self) -> None:
        for first, second in self._index.collisions():
            id = self.question(first).id
            if id == self.question(second).id:
                raise ValueError(f"{self._table.path}: rows {first + 1} and {second + 1} have the same index {id!r}")

    def _refuse_dangling(self, pointing: np.ndarray, targets: np.ndarray) -> None:
        rows = self._index.first(targets)
        kinds = np.frombuffer(self._image_kinds, np.uint8)
        for place in np.flatnonzero((rows < 0) | (kinds[rows] != OWN)):
            number = int(pointing[place])
            pointer = self._image_cells(number)[0]
            wrong = "which there is none of" if rows[place] < 0 else "which has no image of its own"
            raise self._table.error(number, f"its image must be that of row {pointer!r}, {wrong}")

    def _notes(self) -> tuple[str, ...]:
        rows, sizes = self.counted(), self.published_rows
        if self.known is not None or not sizes or rows <= min(sizes) or rows in sizes:
            return self.notes()
        return (*self.notes(), f"The file has {rows} rows, and published ones have {' or '.join(map(str, sizes))}.")

    def _describe(self, allow_partial: bool) -> Dataset:
        table = self._table
        self.known = known = KNOWN_FILES.get(table.md5)
        if known is not None and known.benchmark != self.name:
            advice = f"it belongs to {known.benchmark}" if known.benchmark else "no benchmark here reads it"
            raise ValueError(f"{table.path}: it is {known.name}, which is not {self.title}; {advice}")
        expected = min(self.published_rows, default=None) if known is None else self.counted()
        dataset = Dataset(
            str(table.path), table.md5, known and known.name, self.counted(), expected, " ".join(self._notes())
        )
        if dataset.is_partial and not allow_partial:
            raise ValueError(
                f"{table.path}: it has {dataset.rows} rows of {self.title}, and {expected} were published; "
                "allow_partial (--partial) scores it nevertheless"
            )
        return dataset
