"""Which weights a file was made for."""

from hashlib import file_digest
from pathlib import Path

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")  # whole, or in parts


def checkpoint_sha256(folder: Path | str) -> str | None:
    """The SHA-256 of a local checkpoint's weights, or of their index if they are in parts; None if there are none."""
    for name in WEIGHTS:
        if (file := Path(folder) / name).is_file():
            with file.open("rb") as opened:
                return file_digest(opened, "sha256").hexdigest()
    return None
