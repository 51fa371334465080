"""Turn the images that callers give into RGB images. No torch, and no numpy until it is needed."""

import base64
import binascii
import io
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from os import PathLike
from typing import IO, TYPE_CHECKING, Any, NoReturn, TypeAlias, TypeGuard, cast
from urllib.parse import unquote_to_bytes, urlsplit
from urllib.request import url2pathname

from PIL import ExifTags, Image, UnidentifiedImageError

if TYPE_CHECKING:
    import numpy as np

ImageLike: TypeAlias = (
    "Image.Image | np.ndarray | str | PathLike | bytes | bytearray | memoryview | IO[bytes] | Mapping[str, Any]"
)

Images: TypeAlias = "ImageLike | Sequence[ImageLike] | None"  # of a question: one image, several in order, or none

KINDS = "a path, a data URI, bytes, a binary file, a PIL image, an array or a mapping with 'bytes' or 'path'"
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}  # by the channels of an array
PLAIN_MODES = ("1", "L", "P", "RGB")


def open_image(image: ImageLike) -> Image.Image:
    """Return ``image`` as an RGB image that looks as it does in a viewer.

    Transparent pixels are laid on white. The EXIF orientation is applied. Of several frames the first one is taken.
    Values of more than 8 bits are scaled, with a warning.

    Args:
        image: a path or ``file:`` URI, a ``data:`` URI, the bytes of a file, a binary file object, a PIL image, an
            array [H, W] or [H, W, 1 to 4] of booleans, integers or floats, or a mapping with "bytes" or "path", as in
            Hugging Face datasets.

    Raises:
        ValueError: there is no such file, or it is not an image that can be read to its end. The message names it.
        TypeError: ``image`` is of another type.
    """
    with naming(_name_of(image)):
        if isinstance(image, Image.Image):
            return to_rgb(image)
        if _is_array(image):
            return to_rgb(_from_array(image))
        with Image.open(_file_of(image)) as opened:
            return to_rgb(opened)


def image_size(path: str) -> tuple[int, int]:
    """Return the width and height of the image that ``open_image`` would return, in pixels. Only its head is read.

    Raises:
        ValueError: there is no such file, or it is not an image. The message names it.
    """
    with naming(_name_of(path)), Image.open(_file_of(path)) as opened:
        if opened.format == "TIFF":
            opened.load()  # new releases of Pillow turn its size, but not its pixels, when it is opened
        width, height = opened.size
        return (height, width) if _orientation(opened) in (5, 6, 7, 8) else (width, height)


def images_of(image: Images) -> tuple[ImageLike, ...]:
    """Return the images that a question is about: those of a list or a tuple, the only one, or none."""
    if image is None:
        return ()
    return tuple(image) if isinstance(image, (list, tuple)) else (cast("ImageLike", image),)


def check_image(image: ImageLike) -> None:
    """Raise what ``open_image`` would raise, as far as that can be told without reading a file."""
    if isinstance(image, Image.Image) or _is_array(image) or hasattr(image, "read"):
        return
    with naming(_name_of(image)):
        _file_of(image)


def opener(image: ImageLike) -> Callable[[], Image.Image]:
    """Return a function that does ``open_image``, more than once. A file object is read now.

    What goes wrong in reading it is raised by the function.
    """
    if not hasattr(image, "read"):
        return lambda: open_image(image)
    try:
        with naming(_name_of(image)):
            data = _read(image)
    except (ValueError, TypeError) as error:
        return partial(_raise, error)
    return lambda: open_image(data)


def _raise(error: Exception) -> NoReturn:
    raise error


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Turn what goes wrong in reading the image ``name`` into a ``ValueError`` of one line that names it."""
    try:
        yield
    except TypeError:
        raise
    except UnidentifiedImageError:
        raise ValueError(f"image must be a readable image, got {name}: its format is not known") from None
    except Exception as error:  # a decoder may raise anything on a broken file
        reason = getattr(error, "strerror", None) or " ".join(f"{error or type(error).__name__}".split())[:200]
        raise ValueError(f"image must be a readable image, got {name}: {reason}") from None


def data_uri(data: bytes, kind: str) -> str:
    """Return the bytes of an image file of a format such as "png" as a data URI."""
    return f"data:image/{kind.lower()};base64,{base64.b64encode(data).decode()}"


def to_rgb(image: Image.Image) -> Image.Image:
    """Return a copy of ``image`` in RGB: upright, on white, in 8 bits. Raises what Pillow raises on a broken file."""
    if 0 in image.size:
        raise ValueError(f"it has {image.width} x {image.height} pixels")
    image.load()
    turn = TURNS.get(_orientation(image))
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        import numpy as np

        values, clear = np.asarray(image), image.info.get("transparency")
        pixels = to_8_bits(values)
        if isinstance(clear, int):  # the grey value that a PNG declares transparent
            pixels[values == clear] = 255
        image = Image.fromarray(pixels)
    if image.has_transparency_data:
        image = image.convert("LA") if image.mode == "La" else image
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    image = image if turn is None else image.transpose(turn)
    image.info.clear()  # or a second look would turn it again
    return image


def is_plain(image: Image.Image) -> bool:
    """Whether every reader shows the pixels of ``image`` as ``to_rgb`` does, so that its file can be passed on."""
    return (
        image.mode in PLAIN_MODES
        and not image.has_transparency_data
        and _orientation(image) not in TURNS
        and getattr(image, "n_frames", 1) == 1
    )


def to_8_bits(values: "np.ndarray") -> "np.ndarray":
    """Scale ``values`` to uint8.

    Booleans and unsigned integers of 16 bits are scaled by the range of their type. Others are taken to be in [0, 1] if
    they are floats, in [0, 255] or in [0, 65535], whichever is the first that holds them all, or else in the range from
    their least to their greatest value.
    """
    import numpy as np

    values = values.astype(values.dtype.newbyteorder("="), copy=False)
    if values.dtype == np.uint8:
        return values
    if values.dtype == bool:
        return values.astype(np.uint8) * 255
    if values.dtype.kind not in "uif":
        raise ValueError(f"its values must be booleans, integers or floats, but are {values.dtype}")
    least, most = float(values.min()), float(values.max())
    if not np.isfinite([least, most]).all():
        raise ValueError("its values must be finite")
    ranges = [65535.0] if values.dtype == np.uint16 else [1.0, 255.0, 65535.0][values.dtype.kind != "f" :]
    low, high = next(((0.0, top) for top in ranges if least >= 0 and most <= top), (least, most))
    if high != 255:
        warnings.warn(f"image values in [{low:g}, {high:g}] were scaled to 8 bits", stacklevel=2)
    return np.rint((values.astype(np.float64) - low) * (255 / ((high - low) or 1))).astype(np.uint8)


def _is_array(image: object) -> "TypeGuard[np.ndarray]":
    numpy = sys.modules.get("numpy")  # without it there are no arrays
    return numpy is not None and isinstance(image, numpy.ndarray)


def _from_array(array: "np.ndarray") -> Image.Image:
    import numpy as np

    channels = 1 if array.ndim == 2 else array.shape[2] if array.ndim == 3 else 0
    if channels not in MODES or not array.size:
        raise ValueError(f"its shape must be [H, W] or [H, W, 1 to 4], but is {list(array.shape)}")
    pixels = np.ascontiguousarray(to_8_bits(array))
    return Image.frombytes(MODES[channels], (array.shape[1], array.shape[0]), pixels.tobytes())


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # metadata that can't be read says nothing
        return 1


def _file_of(image: Any) -> str | IO[bytes]:
    """Return the path or the bytes that ``image`` stands for."""
    if isinstance(image, Mapping):
        inner = image.get("bytes")
        inner = image.get("path") if inner is None else inner
        if inner is None or isinstance(inner, Mapping):
            raise ValueError("it has neither 'bytes' nor a 'path'")
        return _file_of(inner)
    if isinstance(image, (bytes, bytearray, memoryview)):
        return io.BytesIO(image)
    if isinstance(image, str) and image[:5].lower() == "data:":
        return io.BytesIO(_data_of(image))
    if isinstance(image, str) and image[:6].lower() == "file:/":
        uri = urlsplit(image)
        if uri.netloc not in ("", "localhost"):
            raise ValueError(f"its host must be this one, got {uri.netloc!r}")
        image = url2pathname(uri.path)
    if isinstance(image, str) and image.lower().startswith(("http://", "https://")):
        raise ValueError("nothing is downloaded; give its bytes")
    if isinstance(image, (str, PathLike)):
        if not os.path.isfile(image):  # to open a pipe or a device would wait, or never end
            os.stat(image)
            raise ValueError("it is not a file")
        return os.fspath(image)
    if hasattr(image, "read"):
        return io.BytesIO(_read(image))
    raise TypeError(f"image must be {KINDS}, got {type(image).__name__}")


def _read(file: Any) -> bytes:
    """Read a file object from its start, as Pillow does, wherever an earlier reader has left it."""
    if getattr(file, "seekable", bool)():
        file.seek(0)
    data = file.read()
    if not isinstance(data, bytes):
        raise TypeError(f"image must be a file opened in binary mode, got one that reads {type(data).__name__}")
    return data


def _data_of(uri: str) -> bytes:
    head, comma, body = uri.partition(",")
    data = unquote_to_bytes(body)
    if not comma or not data:
        raise ValueError("a data URI must be data:TYPE;base64,DATA")
    if not head.lower().endswith(";base64"):
        return data
    try:
        return base64.b64decode(b"".join(data.split()), validate=True)
    except binascii.Error as error:
        raise ValueError(f"its base64 is wrong ({error})") from None


def _name_of(image: Any) -> str:
    """Return what an error calls ``image``: never its data."""
    if isinstance(image, Mapping):
        return _name_of(image["path"]) if image.get("path") else "a mapping"
    if isinstance(image, Image.Image):
        return repr(name) if (name := getattr(image, "filename", "")) else f"an image of mode {image.mode}"
    if _is_array(image):
        return f"an array of {image.dtype}"
    if isinstance(image, (bytes, bytearray, memoryview)):
        return f"{len(image)} bytes"
    if isinstance(image, str):
        if image[:5].lower() == "data:":
            return f"a data URI of {len(image)} characters"
        return repr(image) if len(image) <= 300 else f"a string of {len(image)} characters, {image[:30]!r}..."
    return repr(str(image) if isinstance(image, PathLike) else getattr(image, "name", type(image).__name__))
