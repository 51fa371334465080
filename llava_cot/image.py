"""Turn the images that callers give into RGB images. No torch."""

from os import PathLike

import numpy as np
from PIL import Image

ImageLike = Image.Image | np.ndarray | str | PathLike


def open_image(image: ImageLike) -> Image.Image:
    """Return ``image`` as an RGB image.

    Raises:
        ValueError: an array that is not uint8 [H, W, 3], or a file that cannot be read or decoded.
        TypeError: neither an image, nor an array, nor a path.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise ValueError(f"image must be a uint8 array [H, W, 3], got {image.dtype} {list(image.shape)}")
        image = Image.fromarray(image)
    if isinstance(image, (str, PathLike)):
        try:
            image = Image.open(image)
        except (OSError, Image.DecompressionBombError) as error:
            raise ValueError(f"image must be a readable image file, got {str(image)!r}: {error}") from None
    if not isinstance(image, Image.Image):
        raise TypeError(f"image must be a PIL image, an array or a path, got {type(image).__name__}")
    try:
        return image.convert("RGB")
    except OSError as error:
        raise ValueError(f"image must be a readable image, got one that breaks off: {error}") from None
