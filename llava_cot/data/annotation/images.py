"""Image files as an endpoint takes them: data URLs of the bytes as they are, or of a PNG."""

import base64
import io
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from PIL import Image

SENT_AS_THEY_ARE = ("JPEG", "PNG", "WEBP")  # what every endpoint reads


@dataclass(frozen=True)
class SentImage:
    """A data URL, and the hash of the file's bytes."""

    url: str
    sha256: str


def read_image(path: Path) -> SentImage:
    """Decode the whole image to know that it can be, then keep its bytes; other formats become PNG.

    Raises:
        ValueError: there is no such image, or it breaks off.
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
