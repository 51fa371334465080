"""Turn the image addresses of a request into pixels, of which nothing has been trusted.

The declared type of a data URI is ignored: the first bytes of the file choose one of four formats, and no other decoder
than that one reads it. What follows the end of the image in the file is never read. The engine gets pixels only.
"""

import binascii
import io
import logging
import re
from asyncio import get_running_loop
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NoReturn

from PIL import Image

from llava_cot.image import open_image
from llava_cot.serve.errors import RequestError
from llava_cot.serve.fetch import Fetcher, too_large
from llava_cot.serve.held import Holding
from llava_cot.serve.limits import Limits

log = logging.getLogger(__name__)

DECODERS = 2  # images decoded at a time; each may take some 15 bytes a pixel
PIECE = 2**20  # characters of base64 decoded at a time, a multiple of 4: the interpreter runs no other thread meanwhile
MAX_HEAD = 200  # characters of a data URI before its data
MAX_SCANS = 100  # of a JPEG; a progressive one has about 10, and each costs a pass over all its pixels
MAX_PARTS = 10_000  # segments of a JPEG or chunks of a PNG; writers of PNG make chunks of 8 KiB or more
SEGMENT = re.compile(rb"\xff[^\x00\x01\xd0-\xd7\xff]")  # a marker that a length follows
SCAN, END = b"\xff\xda", b"\xff\xd9"


class ImageReader:
    """Reads the images of requests in a few threads of its own.

    Args:
        fetcher: downloads https URLs. Without one, only data URIs are read.
    """

    def __init__(self, limits: Limits, fetcher: Fetcher | None = None) -> None:
        self.limits, self.fetcher = limits, fetcher
        self._pool = ThreadPoolExecutor(DECODERS, "images")

    async def read(self, images: Sequence[tuple[str, str]], holding: Holding) -> list[Image.Image]:
        """Return the images of one request in RGB, upright and on white.

        Args:
            images: the name of the field, such as "messages[0].content[1].image_url.url", and its URL, of each image.
            holding: counts the files while they are read, and the pixels.

        Raises:
            RequestError: 400 for what is no image that can be read, 413 for what is above a limit, and 429 if all
                requests together hold too much.
        """
        limits, loop = self.limits, get_running_loop()
        if len(images) > limits.max_images:
            raise RequestError(413, f"A request may have at most {limits.max_images} images.", images[-1][0], "images")
        files, size = [], 0
        for param, url in images:
            is_here = url[:5].lower() == "data:"
            most = len(url) * 3 // 4 if is_here else limits.max_image_bytes
            holding.add(bytes=most)
            size += most
            if is_here:
                files.append(await loop.run_in_executor(self._pool, _data_of, param, url, limits))
            elif self.fetcher is not None and url[:8].lower() == "https://":
                files.append(await self.fetcher.fetch(url, param))
            else:
                also = ": this server downloads none" if self.fetcher is None else " or an https URL"
                raise _refused(param, f"An image must be a base64 data URI{also}.", "image_url")
        pixels = 0
        for (param, _), data in zip(images, files):
            width, height = await loop.run_in_executor(self._pool, _checked_size, param, data, limits)
            pixels += width * height
            if pixels > limits.max_pixels:
                raise _too_many_pixels(param, limits)
        holding.add(pixels=pixels)
        decode = [partial(_decoded, param, data) for (param, _), data in zip(images, files)]
        found = [await loop.run_in_executor(self._pool, each) for each in decode]
        holding.add(bytes=-size)
        return found

    def close(self) -> None:
        """Drop what waits for a thread, and end the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _refused(param: str, message: str, code: str = "invalid_image") -> RequestError:
    return RequestError(400, message, param, code)


def _too_many_pixels(param: str, limits: Limits) -> RequestError:
    message = f"The images of a request may have at most {limits.max_pixels} pixels in all."
    return RequestError(413, message, param, "image_too_large")


def _data_of(param: str, uri: str, limits: Limits) -> bytes:
    """The bytes of a data URI. Nothing is decoded before its length is known to be right."""
    head, comma, _ = uri[: MAX_HEAD + 1].partition(",")
    start = len(head) + 1
    if not comma or not head.lower().endswith(";base64") or start >= len(uri):
        raise _refused(param, "An image's data URI must be data:TYPE;base64,DATA.")
    if len(uri) - start > 4 * -(-limits.max_image_bytes // 3):
        raise too_large(param, limits.max_image_bytes)
    try:
        if (len(uri) - start) % 4 or 0 <= uri.find("=", start) < len(uri) - 2:
            raise binascii.Error("padding that is missing or not at the end")
        pieces = (uri[at : at + PIECE].encode("ascii") for at in range(start, len(uri), PIECE))
        return b"".join(binascii.a2b_base64(piece, strict_mode=True) for piece in pieces)
    except (binascii.Error, UnicodeEncodeError):
        raise _refused(param, "An image's base64 data is wrong.") from None


def _format_of(data: bytes) -> str | None:
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    return "WEBP" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else None


def _checked_size(param: str, data: bytes, limits: Limits) -> tuple[int, int]:
    """The width and height that the file declares. None of its pixels is decoded."""
    if len(data) > limits.max_image_bytes:
        raise too_large(param, limits.max_image_bytes)
    kind = _format_of(data)
    if kind is None:
        raise _refused(param, "An image must be a JPEG, PNG, WebP or GIF file.")
    if kind in ("JPEG", "PNG") and _has_many_parts(data, kind):
        raise _refused(param, f"A {kind} image may have at most {MAX_SCANS} scans and {MAX_PARTS} parts.")
    try:
        # Pillow opens a WebP file by allocating its whole canvas, so its size is read first.
        width, height = _webp_size(data) if kind == "WEBP" else _open(data, kind).size
    except Image.DecompressionBombError:
        raise _too_many_pixels(param, limits) from None
    except Exception as error:  # a decoder may raise anything on a broken file
        _unreadable(param, error)
    short, long = sorted((width, height))
    if short < limits.min_side:
        raise _refused(param, f"An image's sides must have at least {limits.min_side} pixels.", "image_too_small")
    if long > limits.max_aspect * short:
        raise _refused(param, f"An image's long side may be at most {limits.max_aspect} times its short side.")
    return width, height


def _webp_size(data: bytes) -> tuple[int, int]:
    """The canvas of a WebP file (RFC 9649, section 2)."""
    chunk, body = data[12:16], data[20:30]
    if len(body) < 10:
        raise ValueError("a WebP file of fewer than 30 bytes")
    if chunk == b"VP8X":
        return int.from_bytes(body[4:7], "little") + 1, int.from_bytes(body[7:10], "little") + 1
    if chunk == b"VP8L":
        bits = int.from_bytes(body[1:5], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if chunk == b"VP8 ":
        return int.from_bytes(body[6:8], "little") & 0x3FFF, int.from_bytes(body[8:10], "little") & 0x3FFF
    raise ValueError("a WebP file that starts with another chunk")


def _has_many_parts(data: bytes, kind: str) -> bool:
    """Whether a file has more scans, segments or chunks than any that is meant to be looked at."""
    scans, at = 0, 8 if kind == "PNG" else 2
    for _ in range(MAX_PARTS):
        if kind == "PNG":
            if data[at + 4 : at + 8] in (b"IEND", b""):
                return False
            at += 12 + int.from_bytes(data[at : at + 4])
        else:
            marker = SEGMENT.search(data, at)
            if marker is None or marker[0] == END:
                return False
            scans += marker[0] == SCAN
            if scans > MAX_SCANS:
                return True
            at = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2])
    return True


def _open(data: bytes, kind: str) -> Image.Image:
    return Image.open(io.BytesIO(data), formats=[kind])


def _decoded(param: str, data: bytes) -> Image.Image:
    kind = _format_of(data)
    assert kind is not None
    try:
        with _open(data, kind) as opened:
            declared = opened.size if kind != "WEBP" else _webp_size(data)
            image = open_image(opened)
            if sorted(image.size) != sorted(declared):
                raise ValueError(f"it declares {declared}, and has {image.size}")
            return image
    except Exception as error:
        _unreadable(param, error)


def _unreadable(param: str, error: Exception) -> NoReturn:
    log.info("%s can't be read: %r", param, error)
    raise _refused(param, "The image can't be read: its file is broken or incomplete.") from None
