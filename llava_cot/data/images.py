"""Check that a path leads to an image that can be read completely and is not in a test set."""

import os
import stat
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, lru_cache
from hashlib import blake2b
from pathlib import Path, PurePath
from typing import Any

from PIL import Image

from llava_cot.data.defect import Defect
from llava_cot.image import to_rgb

CACHE = 1 << 16  # images whose verdict is remembered, about 300 bytes each, since rows about one image may be far apart


class ImageChecks:
    """Judges paths of images relative to ``folder``.

    Args:
        max_aspect: the largest ratio of the longer side to the shorter one.
        decode: whether to read all pixels; otherwise only the file must exist.
        forbidden: ``image_hashes`` of images that must not be trained on.

    Raises:
        ValueError: an argument is out of range, or ``folder`` is not a folder.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        max_aspect: float = 50.0,
        decode: bool = True,
        forbidden: frozenset[bytes] = frozenset(),
    ) -> None:
        if not max_aspect >= 1:
            raise ValueError(f"max_aspect must be >= 1, got {max_aspect}")
        if forbidden and not decode:
            raise ValueError("decode must be on to compare images with those of a test set, got off")
        if not os.path.isdir(folder):
            raise ValueError(f"images must be a folder, got {str(folder)!r}")
        self.root = os.path.realpath(folder)
        self.max_aspect, self.decode, self.forbidden = max_aspect, decode, forbidden

    def check(self, path: str) -> str | None:
        """Return the mode of the image, such as RGB, or None if it was not decoded.

        Raises:
            Defect: the path leaves the folder, or leads to no image that can be trained on.
        """
        kind, text = self._judged(path)
        if kind == "":
            return text
        raise Defect(kind, f"{path!r} {text}" if len(path) < 300 else f"{path[:300]!r}... {text}")

    @cached_property
    def _judged(self) -> Callable[[str], tuple[str, str | None]]:
        return lru_cache(CACHE)(self._judge)

    def __getstate__(self) -> dict[str, Any]:  # the cache is not sent to a worker
        return {name: value for name, value in vars(self).items() if name != "_judged"}

    def _judge(self, path: str) -> tuple[str, str | None]:
        """Return the kind of defect and its detail, or an empty kind and the mode of the image."""
        try:
            if not self._is_inside(path):
                return "image outside of the folder", "must be a path inside of it"
            real = os.path.join(self.root, path)
            info = os.stat(real)
        except (OSError, ValueError) as error:  # ValueError: a null byte
            return "missing image", f"can't be found: {getattr(error, 'strerror', None) or error}"
        if not stat.S_ISREG(info.st_mode):  # opening a pipe would wait for ever
            return "missing image", "is no file"
        if not info.st_size:
            return "image of zero size", "has 0 bytes"
        return self._look(real) if self.decode else ("", None)

    def _is_inside(self, path: str) -> bool:
        """Return whether a row's path stays in the folder.

        A link in the folder may lead out of it, since its owner made it: in the hub's cache, every file is one.
        """
        if os.path.isabs(path) or os.path.normpath(path) == os.curdir:
            return False
        if os.pardir not in PurePath(path).parts:
            return True
        return os.path.realpath(os.path.join(self.root, path)).startswith(os.path.join(self.root, ""))

    def _look(self, path: str) -> tuple[str, str | None]:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                warnings.simplefilter("error", Image.DecompressionBombWarning)  # memory is bounded: 89 megapixels
                with Image.open(path) as image:
                    width, height = image.size
                    mode = image.mode
                    if 0 in image.size:
                        return "image of zero size", f"has {width} x {height} pixels"
                    pixels = to_rgb(image)
        except Exception as error:  # a decoder may raise anything on a broken file
            return "unreadable image", f"can't be decoded: {type(error).__name__}: {str(error)[:200]}"
        if max(width, height) > self.max_aspect * min(width, height):
            return "extreme aspect", f"has {width} x {height} pixels, more than {self.max_aspect:g} to 1"
        if self.forbidden and not self.forbidden.isdisjoint((_file_hash(path), _pixel_hash(pixels))):
            return "test image", "is one of the test images"
        return "", mode


def image_hashes(folder: Path | str, workers: int = 1) -> frozenset[bytes]:
    """Return 16-byte hashes of every image below ``folder``: one of the file and one of its RGB pixels.

    They find a copy with another name or in another lossless format. They do not find one that was scaled or compressed
    again.

    Raises:
        ValueError: no file in the folder is an image.
    """
    with ThreadPoolExecutor(workers) as pool:  # PIL decodes outside of the interpreter's lock
        hashes = [*pool.map(_hashes, _files(folder))]
    if not any(pixels for _, pixels in hashes):
        raise ValueError(f"test_images must be a folder of images, got none below {str(folder)!r}")
    return frozenset(digest for pair in hashes for digest in pair if digest)


def _files(folder: Path | str) -> Iterator[str]:
    for parent, _, names in os.walk(folder):
        yield from (path for name in names if os.path.isfile(path := os.path.join(parent, name)))


def _hashes(path: str) -> tuple[bytes, bytes | None]:
    try:
        with Image.open(path) as image:
            pixels = _pixel_hash(to_rgb(image))
    except Exception:  # the folder of a benchmark has labels and licences too
        pixels = None
    return _file_hash(path), pixels


def _file_hash(path: str) -> bytes:
    with open(path, "rb") as file:
        return blake2b(file.read(), digest_size=16).digest()


def _pixel_hash(image: Image.Image) -> bytes:
    return blake2b(image.tobytes(), digest_size=16, person=b"%dx%d" % image.size).digest()
