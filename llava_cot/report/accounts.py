"""Where the tokens and the seconds of a search went, column by column."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llava_cot.report.card import Card

OUTSIDE = "outside the tree"


@dataclass(frozen=True)
class Account:
    """What a column cost; ``path`` are the tokens of the returned answers."""

    name: str
    candidates: int
    tokens: int
    path: int
    drawing: float  # seconds
    scoring: float  # seconds

    @property
    def wasted(self) -> float:
        return wasted(self.tokens, self.path)


def wasted(tokens: int, path: int) -> float:
    """The share of the drawn tokens that no returned answer has, in [0, 1]."""
    return max(0.0, 1 - path / tokens) if tokens else 0.0


def accounts(
    cards: Mapping[int, Card], headings: Sequence[str], events: Sequence[Mapping[str, Any]], generated: int
) -> list[Account]:
    """One for each column, and one for the tokens that are not in the tree: of what a scorer let the model write, of
    beams that were dropped, of a run that was lost.

    The time before an event belongs to what it is about: a stage's seconds run from the event before.
    """
    seconds: dict[tuple[int, bool], float] = defaultdict(float)
    before = 0.0
    for event in events:
        ids = event.get("nodes") or event.get("pool")
        card = cards.get(int(ids[0])) if ids else None
        if card:
            now = float(event["seconds"])
            seconds[card.column, event["event"] == "scored"] += now - before
            before = now
    found = []
    for column, heading in enumerate(headings):
        own = [card for card in cards.values() if card.column == column]
        path = sum(card.tokens for card in own if card.in_answer)
        tokens = sum(card.tokens for card in own)
        found.append(Account(heading, len(own), tokens, path, seconds[column, False], seconds[column, True]))
    outside = generated - sum(account.tokens for account in found)
    return [*found, Account(OUTSIDE, 0, outside, 0, 0.0, 0.0)] if outside > 0 else found
