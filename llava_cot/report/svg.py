"""Draw the SVG parts of a page. Positions are percentages, so that they fit columns of any width."""

from collections.abc import Mapping, Sequence
from html import escape
from math import isfinite

from llava_cot.report.card import Card
from llava_cot.report.numbers import number

LAYERS = ("drawn", "pruned", "kept", "winner")  # the winner on top
ROW = 14  # the height of a round in the strip plot, in pixels


def strip(cards: Sequence[Card], cutoffs: Sequence[float], rounds: Mapping[int, int]) -> str:
    """Draw the scores of a column, one row per round, and its cutoffs.

    A candidate without a finite score is drawn at the left edge. ``rounds`` maps the number of a round to its row.
    """
    scores = [card.score for card in cards if card.score is not None and isfinite(card.score)]
    cuts = [cutoff for cutoff in cutoffs if isfinite(cutoff)]
    low, high = min([*scores, *cuts], default=0.0), max([*scores, *cuts], default=0.0)

    def share(value: float) -> float:
        return (value - low) / (high - low) if high > low else 0.5

    def x(value: float) -> str:
        return f"{10 + 80 * share(value):.2f}%"

    bottom = 16 + ROW * len(rounds)
    parts = [f'<line class="axis" x1="10%" x2="90%" y1="{bottom}" y2="{bottom}"/>']
    for cut in cuts:
        parts.append(f'<line class="cutoff" x1="{x(cut)}" x2="{x(cut)}" y1="12" y2="{bottom}"/>')
        anchor = "start" if share(cut) < 0.2 else "end" if share(cut) > 0.8 else "middle"  # stays in its column
        parts.append(f'<text class="cutoff" x="{x(cut)}" y="9" text-anchor="{anchor}">cutoff {number(cut)}</text>')
    for card in sorted(cards, key=lambda card: LAYERS.index(card.state)):
        place = x(card.score) if card.score is not None and isfinite(card.score) else "3%"
        y = 16 + ROW * rounds[card.round] + ROW // 2
        title = escape(f"#{card.id}, round {card.round}: {number(card.score)}, {card.label[2:]}")
        dot = f'<circle class="{card.state}" cx="{place}" cy="{y}" r="4.5"><title>{title}</title></circle>'
        parts.append(f'<a href="#n{card.id}" tabindex="-1">{dot}</a>')
    ends = [(low, "10%", "start"), (high, "90%", "end")] if high > low else [(low, "50%", "middle")]
    for value, place, anchor in ends if scores or cuts else ():
        parts.append(f'<text x="{place}" y="{bottom + 12}" text-anchor="{anchor}">{number(value)}</text>')
    return (
        f'<svg class="strip" role="img" aria-label="scores" width="100%" height="{bottom + 16}">{"".join(parts)}</svg>'
    )


def arrow(start: int, end: int, columns: int) -> str:
    """Draw an arrow from the foot of column ``start``, through the band between two rounds, to the head of ``end``."""
    x1, x2 = (f"{100 * (column + 0.5) / columns:.2f}%" for column in (start, end))
    # Heights are measured from the foot of the band, because its label may have any number of lines.
    lines = ((x1, -9999, x1, -30), (x1, -30, x2, -30), (x2, -30, x2, -10))
    drawn = "".join(f'<line x1="{a}" y1="{b}" x2="{c}" y2="{d}"/>' for a, b, c, d in lines)
    head = f'<svg x="{x2}" overflow="visible"><path d="M-8-12H8L0 0z"/></svg>'
    foot = f'<svg y="100%" overflow="visible">{drawn}{head}</svg>'
    return f'<svg class="arrow" aria-hidden="true" width="100%" height="100%">{foot}</svg>'
