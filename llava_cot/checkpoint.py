"""Identify the weights that a file was made for."""

from hashlib import file_digest
from pathlib import Path

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")  # one file, or the index of several


def checkpoint_sha256(folder: Path | str) -> str | None:
    """Return the SHA-256 of a local checkpoint's weights, or of their index if they are in several files.

    None if the folder has neither.
    """
    for name in WEIGHTS:
        if (file := Path(folder) / name).is_file():
            with file.open("rb") as opened:
                return file_digest(opened, "sha256").hexdigest()
    return None
