"""Write files that appear whole or not at all."""

import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO


def check_output(path: Path | str, name: str) -> None:
    """Check, before any work is done, that ``path`` can be written.

    Raises:
        ValueError: it is a folder, its folder does not exist, or it may not be written. The message begins with
            ``name``.
    """
    target = os.path.realpath(path)
    if os.path.isdir(target) or not os.path.isdir(os.path.dirname(target)):
        raise ValueError(f"{name} must be a file in a folder that exists, got {str(path)!r}")
    # A file is replaced, which its folder must allow. Anything else, such as a device, is written itself.
    if not os.access(os.path.dirname(target) if _is_replaced(target) else target, os.W_OK):
        raise ValueError(f"{name} must be a file that may be written, got {str(path)!r}")


def check_output_folder(path: Path | str, name: str) -> None:
    """Check, before any work is done, that files can be written to a folder. It may be one that is made then.

    Raises:
        ValueError: it, or a folder that it would be in, is a file or may not be written. The message begins with
            ``name``.
    """
    nearest = next(folder for folder in (Path(path), *Path(path).absolute().parents) if os.path.lexists(folder))
    if not os.path.isdir(nearest):
        raise ValueError(f"{name} must be a folder, got {str(path)!r}, and {str(nearest)!r} is a file")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ValueError(f"{name} must be a folder that may be written, got {str(path)!r}")


def check_apart(path: Path | str, name: str, source: Path | str, source_name: str) -> None:
    """Check that what is written is neither what is read nor in a folder that is read, by whatever name.

    Raises:
        ValueError: it is. The message begins with ``name``.
    """
    written, read = (Path(os.path.realpath(given)) for given in (path, source))
    if written == read:
        raise ValueError(f"{name} must be another file than {source_name}, got {str(path)!r} for both")
    if written.is_relative_to(read):
        raise ValueError(f"{name} must not be in {source_name}, got {str(path)!r} in {str(source)!r}")


@contextmanager
def replacing(path: Path | str, errors: str = "strict") -> Iterator[TextIO]:
    """Yield a UTF-8 file to write, which replaces ``path`` when the block ends.

    A reader of ``path`` sees either the old content or all of the new one. If the block raises, ``path`` is unchanged.
    A link stays a link, and the file that it leads to is replaced. The new file has the mode and, where that is
    allowed, the owner of the old one. A device or a pipe cannot be replaced, and is written as the block goes.

    Args:
        errors: as ``open`` takes it. A page that names a path needs "backslashreplace", since a name may be no text.
    """
    target = Path(os.path.realpath(path))
    if not _is_replaced(target):
        with target.open("w", encoding="utf-8", errors=errors) as file:
            yield file
        return
    part = target.with_name(f".{target.name}.{os.getpid()}.part")  # in the same folder, so that renaming is atomic
    try:
        with part.open("w", encoding="utf-8", errors=errors) as file:
            yield file
        if target.exists():
            old = target.stat()
            with suppress(PermissionError):
                os.chown(part, old.st_uid, old.st_gid)
            shutil.copymode(target, part)
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def _is_replaced(target: Path | str) -> bool:
    """Whether ``target`` is a file or does not exist yet."""
    try:
        return stat.S_ISREG(os.stat(target).st_mode)
    except FileNotFoundError:
        return True
