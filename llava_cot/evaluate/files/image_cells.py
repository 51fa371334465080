"""The images of a row, in each of the ways that benchmarks' files have them."""

import base64
import binascii
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_cot.evaluate.files.table import Row

if TYPE_CHECKING:
    from llava_cot.image import ImageLike

IMAGE_COLUMNS = ("decoded_image", "image", "images", "image_path")  # the first that holds something counts
LONGEST_POINTER = 64  # characters: VLMEvalKit takes a shorter cell as the index of another row


def image_cells(row: Row) -> list[Any]:
    """The cells of a row's images, not decoded: one for each image, or none."""
    for name in IMAGE_COLUMNS:
        value = row.get(name)
        if isinstance(value, str):
            if value[:1] == "[" and value[-1:] == "]":  # base64 and paths have neither commas nor quotes
                value = [part.strip().strip("'\"") for part in value[1:-1].split(",")]
            elif value in ("", "nan"):
                continue
        cells = value if isinstance(value, list) else [value]
        cells = [cell for cell in cells if not _is_missing(cell)]
        if cells:
            return cells
    return []


def _is_missing(cell: Any) -> bool:
    if isinstance(cell, Mapping):
        return cell.get("bytes") is None and not cell.get("path")
    return cell is None or cell == "" or cell != cell  # NaN differs from itself


def pointer_of(cells: list[Any]) -> str | None:
    """The index of the row that ``cells`` point to, or None if they are images themselves."""
    if len(cells) != 1 or isinstance(cells[0], (bytes, Mapping)):
        return None
    cell = str(cells[0])
    is_pointer = len(cell) <= LONGEST_POINTER and "." not in cell and not cell.startswith("data:")
    return cell if is_pointer else None


def image_of(cell: Any, folder: Path) -> "ImageLike":
    """Return what a cell stands for: bytes, a data URI, or a path, which is relative to ``folder``.

    Raises:
        ValueError: it is not base64, or there is no such file.
    """
    if isinstance(cell, Mapping):
        cell = cell.get("path") if cell.get("bytes") is None else cell["bytes"]
    if isinstance(cell, bytes):
        return cell
    if not isinstance(cell, str):
        raise ValueError(f"its image must be bytes, base64 or a path, got {type(cell).__name__}")
    if cell.startswith("data:"):
        return cell
    if "." in cell:  # base64 has none
        path = os.path.join(folder, cell)
        if not os.path.isfile(path):  # Path.is_file raises if a name is too long
            raise ValueError(f"its image must be a file, and there is none at {path!r:.300}")
        return path
    try:
        return base64.b64decode("".join(cell.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"its image must be base64, got {cell[:20]!r}...: {error}") from None
