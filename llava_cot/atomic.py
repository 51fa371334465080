"""Files that are there whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO


@contextmanager
def replacing(path: Path | str) -> Iterator[TextIO]:
    """A UTF-8 file to write that takes the place of ``path`` once the block has ended.

    Whoever reads ``path`` sees what was there before or all that was written; what the block raises leaves it alone.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")  # in the same folder, so that the renaming is atomic
    try:
        with part.open("w", encoding="utf-8") as file:
            yield file
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
