"""Read the columns that all rows of ``llava-cot export`` have."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def image_files(row: Mapping[str, Any], folder: Path) -> list[str]:
    """Return the files of the row's images."""
    images = row.get("images")
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise ValueError(f"images must be a list of paths, got {str(images)[:80]!r}")
    return [str(folder / image) for image in images]
