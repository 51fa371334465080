"""A procedural visual-question world with exact four-stage annotations (version 1, fixed).

The world follows CLEVR-Math: coloured shapes on a 3 x 3 grid, and questions that count, subtract and compare.
``sample(seed)`` is the same on every machine. All randomness comes from the raw PCG64 stream, which NumPy guarantees,
through integer arithmetic, and every pixel is an integer.

Seeds 800,000 to 899,999 are the public test range and seeds from 900,000 up are reserved: nothing may be
trained, calibrated or tuned on either.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from PIL import Image

COLORS = {"red": (215, 65, 65), "green": (65, 185, 85), "blue": (75, 95, 215), "yellow": (220, 200, 70)}
SHAPES = ("circle", "square", "triangle")
CELLS = (
    "top left", "top", "top right",
    "left", "center", "right",
    "bottom left", "bottom", "bottom right",
)  # fmt: skip
CELL = 16  # pixels
SIZE = 3 * CELL
TEST_SEEDS = range(800_000, 900_000)
T = TypeVar("T")


@dataclass(frozen=True)
class Sample:
    """A question about an image, with the text of its four stages (without the tags)."""

    image: Image.Image  # RGB, 48 x 48
    question: str
    answer: str
    stages: dict[str, str]  # SUMMARY, CAPTION, REASONING, CONCLUSION


@dataclass(frozen=True)
class _Object:
    cell: int
    color: str
    shape: str


class _Stream:
    """Draws integers below a bound from the raw 64-bit stream, by multiply-shift."""

    def __init__(self, seed: int) -> None:
        self._bits = np.random.PCG64(seed)

    def below(self, n: int) -> int:
        return (int(self._bits.random_raw()) >> 32) * n >> 32

    def pick(self, items: Sequence[T]) -> T:
        return items[self.below(len(items))]

    def pixel_noise(self) -> np.ndarray:
        """Return int32 [SIZE, SIZE, 3]: the centred sum of four bytes, scaled to a standard deviation of 27."""
        raw = self._bits.random_raw(SIZE * SIZE * 3 * 4 // 8).astype("<u8").view(np.uint8)
        total = raw.reshape(SIZE, SIZE, 3, 4).astype(np.int32).sum(axis=-1)
        return (total - 510) * 3 // 16


def sample(seed: int) -> Sample:
    """Return the sample of ``seed``, an integer >= 0.

    Raises:
        ValueError: ``seed`` is negative.
    """
    if seed < 0:
        raise ValueError(f"seed must be >= 0, got {seed}")
    stream = _Stream(seed)
    objects = _scene(stream)
    image = _image(_render(objects, stream) + stream.pixel_noise())
    question, summary, reasoning, answer = _question(objects, stream)
    stages = {
        "SUMMARY": summary,
        "CAPTION": _caption(objects, stream),
        "REASONING": reasoning,
        "CONCLUSION": answer,
    }
    return Sample(image, question, answer, stages)


def clean_view(seed: int) -> Image.Image:
    """Return the image of ``sample(seed)`` without its pixel noise, RGB, 48 x 48, for a verifier that sees better."""
    if seed < 0:
        raise ValueError(f"seed must be >= 0, got {seed}")
    stream = _Stream(seed)
    return _image(_render(_scene(stream), stream))


def is_correct(sample: Sample, conclusion: str) -> bool:
    """Return whether ``conclusion`` is the answer, apart from surrounding white space."""
    return conclusion.strip() == sample.answer


def _scene(stream: _Stream) -> list[_Object]:
    free = list(range(len(CELLS)))
    cells = sorted(free.pop(stream.below(len(free))) for _ in range(3 + stream.below(5)))
    return [_Object(cell, stream.pick(tuple(COLORS)), stream.pick(SHAPES)) for cell in cells]


def _render(objects: list[_Object], stream: _Stream) -> np.ndarray:
    """Draw the image as int32 [SIZE, SIZE, 3], without noise."""
    # Positions and lengths are in sixteenths of a pixel, so that edges fall between pixels without floats.
    pixels = np.empty((SIZE, SIZE, 3), np.int32)
    pixels[:] = 128 + stream.below(41) - 20
    center = np.arange(SIZE, dtype=np.int32) * 16 + 8
    for item in objects:
        row, column = divmod(item.cell, 3)
        dx = (center - (column * CELL * 16 + 128 + stream.below(57) - 28))[None, :]
        dy = (center - (row * CELL * 16 + 128 + stream.below(57) - 28))[:, None]
        mask = _inside(item.shape, dx, dy, radius=74 + stream.below(29))
        pixels[mask] = [channel + stream.below(41) - 20 for channel in COLORS[item.color]]
    return pixels


def _image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8), "RGB")


def _inside(shape: str, dx: np.ndarray, dy: np.ndarray, radius: int) -> np.ndarray:
    if shape == "circle":
        return dx * dx + dy * dy <= radius * radius
    if shape == "square":
        return np.maximum(abs(dx), abs(dy)) * 8 <= radius * 7
    return (4 * dy <= 3 * radius) & (7 * abs(dx) <= 4 * (dy + radius))  # a triangle standing on its base


@dataclass(frozen=True)
class _Kind:
    """A set of objects in a question, given by a colour, a shape, or both."""

    color: str | None
    shape: str | None

    def __str__(self) -> str:
        return " ".join(filter(None, (self.color, f"{self.shape}s" if self.shape else "objects")))

    def count(self, objects: list[_Object]) -> int:
        return sum(self.color in (None, o.color) and self.shape in (None, o.shape) for o in objects)


def _kinds(objects: list[_Object], stream: _Stream) -> tuple[_Kind, _Kind]:
    """Draw two kinds that share no object. Each is more often than not in the image."""

    def draw() -> tuple[str, str]:
        seen = stream.pick(objects)
        return (seen.color, seen.shape) if stream.below(4) else (stream.pick(tuple(COLORS)), stream.pick(SHAPES))

    by_color, by_shape = ((True, False), (False, True), (True, True))[stream.below(3)]
    first, second = draw(), draw()
    while not any(used and a != b for used, a, b in zip((by_color, by_shape), first, second)):
        second = (stream.pick(tuple(COLORS)), stream.pick(SHAPES))
    x, y = (_Kind(color if by_color else None, shape if by_shape else None) for color, shape in (first, second))
    return x, y


def _question(objects: list[_Object], stream: _Stream) -> tuple[str, str, str, str]:
    """Draw (question, summary, reasoning, answer)."""
    x, y = _kinds(objects, stream)
    total, n, m = len(objects), x.count(objects), y.count(objects)
    in_all = stream.pick((f"There are {total} objects.", f"I see {total} objects in all."))
    one = stream.pick((f"The number of {x} is {n}.", f"I count {n} {x}."))
    two = stream.pick((f"The number of {x} is {n} and of {y} is {m}.", f"I count {n} {x} and {m} {y}."))
    task = stream.below(4)
    questions: tuple[str, ...]
    if task == 0:
        questions = (f"How many {x} are there?", f"Count the {x}.", f"What is the number of {x}?")
        summaries = (f"I will count the {x} in the image.", f"The question asks for the number of {x}.")
        return stream.pick(questions), stream.pick(summaries), f"{in_all} {one}", str(n)
    if task == 1:
        questions = (
            f"Subtract all {x}. How many objects are left?",
            f"Remove all {x}. How many objects remain?",
            f"How many objects are not {x}?",
        )
        summaries = (f"I will count all objects and subtract the {x}.", f"I will remove the {x} and count the rest.")
        left = f"{total} - {n} = {total - n}."
        return stream.pick(questions), stream.pick(summaries), f"{in_all} {one} {left}", str(total - n)
    if task == 2:
        questions = (
            f"Subtract all {x} and all {y}. How many objects are left?",
            f"Remove all {x} and all {y}. How many objects remain?",
        )
        summaries = (f"I will subtract the {x} and the {y} from all objects.", f"I will remove the {x} and the {y}.")
        left = f"{total} - {n} - {m} = {total - n - m}."
        return stream.pick(questions), stream.pick(summaries), f"{in_all} {two} {left}", str(total - n - m)
    questions = (f"Are there more {x} than {y}?", f"Do the {x} outnumber the {y}?")
    summaries = (f"I will count the {x} and the {y} and compare.", f"The question compares the {x} with the {y}.")
    verdict = f"{n} is {'' if n > m else 'not '}more than {m}."
    return stream.pick(questions), stream.pick(summaries), f"{two} {verdict}", "yes" if n > m else "no"


def _caption(objects: list[_Object], stream: _Stream) -> str:
    intro = stream.pick(("In the image,", "The picture shows:", "I see"))
    return f"{intro} " + "; ".join(f"{CELLS[o.cell]}: {o.color} {o.shape}" for o in objects) + "."
