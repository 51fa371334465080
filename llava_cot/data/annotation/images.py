"""Turn image files into data URLs for an endpoint, with their original bytes or as PNG."""

import io
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from PIL import Image

from llava_cot.image import data_uri, is_plain, naming, to_rgb

SENT_AS_THEY_ARE = ("JPEG", "PNG", "WEBP")  # every endpoint reads these


@dataclass(frozen=True)
class SentImage:
    """A data URL and the hash of the bytes of its file."""

    url: str
    sha256: str


def read_image(path: Path) -> SentImage:
    """Read an image. It is decoded completely as a check.

    Its bytes are kept if every endpoint shows them as ``open_image`` does. Other formats, transparency, an EXIF
    orientation, more than 8 bits or several frames become a PNG of what ``open_image`` returns.

    Raises:
        ValueError: the image does not exist or cannot be decoded.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"image must be a readable file, got {str(path)!r}: {error.strerror}") from None
    with naming(repr(str(path))), Image.open(io.BytesIO(data)) as image:
        kind, is_kept = image.format, image.format in SENT_AS_THEY_ARE and is_plain(image)
        pixels = to_rgb(image)
    sent = data
    if not is_kept:
        kind, buffer = "PNG", io.BytesIO()
        pixels.save(buffer, kind)
        sent = buffer.getvalue()
    assert kind is not None
    return SentImage(data_uri(sent, kind), sha256(data).hexdigest())
