"""Write files that appear whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO


@contextmanager
def replacing(path: Path | str) -> Iterator[TextIO]:
    """Yield a UTF-8 file to write, which replaces ``path`` when the block ends.

    A reader of ``path`` sees either the old content or all of the new one. If the block raises, ``path`` is unchanged.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")  # in the same folder, so that renaming is atomic
    try:
        with part.open("w", encoding="utf-8") as file:
            yield file
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
