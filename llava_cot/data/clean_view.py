"""What the bundled verifier sees: the image of a question of the shapes world, without its noise."""

from hashlib import blake2b

from PIL.Image import Image

from llava_cot.data import shapes


class CleanView:
    """Finds the seed of an image of the test range by its pixels, and returns ``shapes.clean_view`` of it.

    The range is searched from its start, as far as it has to be. Each image is drawn and hashed once.
    """

    def __init__(self) -> None:
        self._seeds: dict[bytes, int] = {}
        self._unseen = iter(shapes.TEST_SEEDS)

    def __call__(self, image: Image) -> Image:
        digest = _digest(image)
        while digest not in self._seeds:
            seed = next(self._unseen, None)
            if seed is None:
                raise ValueError("the verifier can score the shapes world's test images alone, got another image")
            self._seeds[_digest(shapes.sample(seed).image)] = seed
        return shapes.clean_view(self._seeds[digest])


def _digest(image: Image) -> bytes:
    return blake2b(image.tobytes(), digest_size=8).digest()
