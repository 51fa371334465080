"""Turn image files into data URLs for an endpoint, with their original bytes or as PNG."""

import base64
import io
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from PIL import Image

SENT_AS_THEY_ARE = ("JPEG", "PNG", "WEBP")  # every endpoint reads these


@dataclass(frozen=True)
class SentImage:
    """A data URL and the hash of the bytes of its file."""

    url: str
    sha256: str


def read_image(path: Path) -> SentImage:
    """Read an image. It is decoded completely as a check. Its bytes are kept, except that other formats become PNG.

    Raises:
        ValueError: the image does not exist or cannot be decoded.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"image must be a readable file, got {str(path)!r}: {error.strerror}") from None
    try:
        with Image.open(io.BytesIO(data)) as image:
            kind, pixels = image.format, image.convert("RGB")
    except (ValueError, SyntaxError, OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"image must be a readable image, got {str(path)!r}: {error}") from None
    sent = data
    if kind not in SENT_AS_THEY_ARE:
        kind, buffer = "PNG", io.BytesIO()
        pixels.save(buffer, kind)
        sent = buffer.getvalue()
    assert kind is not None
    return SentImage(f"data:image/{kind.lower()};base64,{base64.b64encode(sent).decode()}", sha256(data).hexdigest())
