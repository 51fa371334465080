"""A plot of accuracy against generated tokens, as SVG. Positions across are percentages, so that it fits any width."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from math import floor, log, log10

HEIGHT, TOP, BOTTOM = 240, 12, 204  # of the plot and of its frame, in pixels
LEFT, RIGHT = 9.0, 96.0  # of the frame, in percent
LOG_FROM = 5.0  # a wider range of tokens is drawn on a logarithmic scale


@dataclass(frozen=True)
class Point:
    """An accuracy with its interval. ``name`` is shown beside the point, if there is one, and when it is pointed at."""

    tokens: float  # generated per question
    accuracy: float
    low: float
    high: float
    title: str
    name: str = ""


def plot(points: Sequence[Point], *, joined: bool = False, label: str = "accuracy against generated tokens") -> str:
    """Return the plot as HTML, with lines between the points if they are ``joined``; without points, nothing."""
    if not points:
        return ""
    points = sorted(points, key=lambda point: point.tokens)
    across = _Across(max(points[0].tokens, 1e-9), max(points[-1].tokens, 1e-9))
    marks = _ticks(min(p.low for p in points), max(p.high for p in points), 5)
    low, high = marks[0], marks[-1]

    def y(value: float) -> str:
        share = (value - low) / (high - low)
        return f"{BOTTOM - (BOTTOM - TOP) * min(1.0, max(0.0, share)):.1f}"

    parts = []
    for mark in marks:
        parts.append(f'<line class="axis" x1="{LEFT}%" x2="{RIGHT}%" y1="{y(mark)}" y2="{y(mark)}"/>')
        parts.append(f'<text x="{LEFT - 1}%" y="{y(mark)}" dy=".35em" text-anchor="end">{mark:.0%}</text>')
    for tokens in across.ticks:
        parts.append(f'<text x="{across(tokens)}" y="{BOTTOM + 16}" text-anchor="middle">{tokens:,g}</text>')
    for one, two in pairwise(points) if joined else ():
        ends = f'x1="{across(one.tokens)}" y1="{y(one.accuracy)}" x2="{across(two.tokens)}" y2="{y(two.accuracy)}"'
        parts.append(f'<line class="curve" {ends}/>')
    for point in points:
        x = across(point.tokens)
        parts.append(f'<line class="interval" x1="{x}" x2="{x}" y1="{y(point.low)}" y2="{y(point.high)}"/>')
        parts.append(f'<circle cx="{x}" cy="{y(point.accuracy)}" r="4.5"><title>{escape(point.title)}</title></circle>')
        if point.name:
            before = across.share(point.tokens) > 0.6  # keeps the name in the frame
            anchor, dx = ("end", -9) if before else ("start", 9)
            parts.append(
                f'<text class="name" x="{x}" y="{y(point.accuracy)}" dx="{dx}" dy=".35em" text-anchor="{anchor}">'
                f"{escape(point.name)}</text>"
            )
    middle = (LEFT + RIGHT) / 2
    parts.append(f'<text x="{middle}%" y="{HEIGHT - 4}" text-anchor="middle">generated tokens per question</text>')
    return (
        f'<svg class="plot" role="img" aria-label="{escape(label)}" width="100%" height="{HEIGHT}">{"".join(parts)}'
        "</svg>"
    )


class _Across:
    """Places of tokens from left to right."""

    def __init__(self, low: float, high: float) -> None:
        self.is_log = high / low > LOG_FROM
        if self.is_log:
            bounds = range(floor(log10(low)), floor(log10(high)) + 2)
            marks = [digit * 10.0**power for power in bounds for digit in (1, 2, 5)]
            self.low, self.high = low / 1.1, high * 1.1
            self.ticks = [mark for mark in marks if self.low <= mark <= self.high]
        else:
            self.ticks = _ticks(low, high, 6)
            self.low, self.high = min(self.ticks[0], low), max(self.ticks[-1], high)

    def share(self, tokens: float) -> float:
        tokens = max(tokens, self.low)
        if self.is_log:
            return log(tokens / self.low) / log(self.high / self.low)
        return (tokens - self.low) / (self.high - self.low)

    def __call__(self, tokens: float) -> str:
        return f"{LEFT + (RIGHT - LEFT) * self.share(tokens):.2f}%"


def _ticks(low: float, high: float, most: int) -> list[float]:
    """Return at least two round numbers around the range, with about ``most`` steps."""
    width = max(high - low, abs(high) * 1e-3, 1e-9) / most
    power = 10.0 ** floor(log10(width))
    step = next(digit * power for digit in (1, 2, 5, 10) if digit * power >= width * (1 - 1e-9))
    first = floor(low / step + 1e-9)
    last = max(first + 1, -floor(-high / step + 1e-9))
    return [round(number * step, 12) for number in range(first, last + 1)]
