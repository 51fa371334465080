"""What is read of every row that ``llava-cot export`` wrote."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def image_files(row: Mapping[str, Any], folder: Path) -> list[str]:
    """The files of the row's images."""
    images = row.get("images")
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise ValueError(f"images must be a list of paths, got {str(images)[:80]!r}")
    return [str(folder / image) for image in images]


def check_prompt(input_ids: Sequence[int], processor, *, images: int, bos: int) -> None:
    """Raise ``ValueError`` unless these tokens have so many images and so many BOS."""
    for what, token, expected in (
        ("an image token", processor.image_token_id, images),
        ("a BOS", processor.tokenizer.bos_token_id, bos),
    ):
        if token is not None and (got := input_ids.count(token)) != expected:
            raise ValueError(f"prompt must have {what} {expected} times, got {got}")
