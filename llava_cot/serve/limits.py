"""The caps of the server: what one request, and all of them together, may cost."""

from dataclasses import dataclass, fields

from llava_cot.core import check_kinds

MIB = 2**20


@dataclass(frozen=True)
class Limits:
    """Every cap is checked before a request is queued, except for the seconds, which are checked while they pass.

    Attributes:
        max_queue: requests that wait or run.
        max_held_bytes: bytes of bodies and image files that all requests hold at once. A request holds its body from
            its first byte until its response has been sent, and its image files until they are decoded.
        max_held_pixels: decoded pixels that all requests hold at once, at 4 bytes each.
        max_generations: candidates that one request may draw over all rounds of its search, times its ``n``.
        max_tokens: tokens that one request may draw over all its candidates.
        max_new_tokens: tokens of one answer.
        max_seconds: seconds that one request may run.
        max_n: answers of one request.
        max_stop: stop strings of one request.
        max_messages: messages of one request.
        max_text: characters of all texts of one request.
        max_read_tokens: tokens of all texts that one request makes the model read. Each of its ``n`` answers reads its
            conversation, and each of its questions is read after it. Images count nothing here.
        max_images: images of one request.
        max_pixels: decoded pixels of all images of one request.
        min_side: pixels of an image's shorter side, at least.
        max_aspect: an image's longer side, in shorter sides.
        max_image_bytes: encoded bytes of one image.
        max_fetch_seconds: seconds to download one image, with its redirects.
        max_header_seconds: seconds in which a request's headers must arrive.
        max_body_bytes: bytes of a request's body.
        max_body_seconds: seconds in which a request's body must arrive.
        max_json_depth: objects and arrays of a body that may stand inside each other.
        max_json_values: values of a body, where an object or an array counts as one more.

    Raises:
        ValueError: a limit is not positive.
        TypeError: a limit is no number, or not whole where its unit is.
    """

    max_queue: int = 128
    max_held_bytes: int = 512 * MIB
    max_held_pixels: int = 400_000_000
    max_generations: int = 256
    max_tokens: int = 131_072
    max_new_tokens: int = 2048
    max_seconds: float = 300.0
    max_n: int = 16
    max_stop: int = 4
    max_messages: int = 64
    max_text: int = 100_000
    max_read_tokens: int = 65_536
    max_images: int = 8
    max_pixels: int = 50_000_000
    min_side: int = 8
    max_aspect: int = 100
    max_image_bytes: int = 20 * MIB
    max_fetch_seconds: float = 10.0
    max_header_seconds: float = 10.0
    max_body_bytes: int = 32 * MIB
    max_body_seconds: float = 60.0
    max_json_depth: int = 16
    max_json_values: int = 50_000

    def __post_init__(self) -> None:
        check_kinds(self)
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0 < value < float("inf"):
                raise ValueError(f"{field.name} must be positive and finite, got {value}")
        for all_of, one in (("max_held_bytes", "max_body_bytes"), ("max_held_pixels", "max_pixels")):
            most, least = getattr(self, all_of), getattr(self, one)
            if most < least:  # no request of that size would ever be let in
                raise ValueError(f"{all_of} must be at least {one}={least}, got {most}")
