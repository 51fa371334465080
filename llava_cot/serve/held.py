"""What all requests together hold in memory while they are received, wait and run."""

from llava_cot.serve.errors import RETRY, RequestError
from llava_cot.serve.limits import Limits


class Held:
    """The bytes of bodies and image files, and the pixels of images, that the requests of one server hold."""

    def __init__(self, limits: Limits) -> None:
        self.max_bytes, self.max_pixels = limits.max_held_bytes, limits.max_held_pixels
        self.bytes, self.pixels = 0, 0

    def holding(self) -> "Holding":
        """Return what a new request holds, which is nothing yet."""
        return Holding(self)


class Holding:
    """What one request holds. ``close`` gives all of it back."""

    def __init__(self, held: Held) -> None:
        self._held, self._bytes, self._pixels = held, 0, 0

    def add(self, *, bytes: int = 0, pixels: int = 0) -> None:
        """Count more of each, or less.

        Raises:
            RequestError: 429, and nothing is counted, if all requests together would hold too much.
        """
        held = self._held
        if held.bytes + bytes > held.max_bytes or held.pixels + pixels > held.max_pixels:
            message = "The requests that the server holds take as much memory as they may."
            raise RequestError(429, message, None, "memory_full", RETRY)
        held.bytes, held.pixels = held.bytes + bytes, held.pixels + pixels
        self._bytes, self._pixels = self._bytes + bytes, self._pixels + pixels

    def close(self) -> None:
        """Give back all of it."""
        self.add(bytes=-self._bytes, pixels=-self._pixels)
