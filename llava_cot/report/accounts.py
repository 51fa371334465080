"""Account for the tokens and the seconds of a search, column by column."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llava_cot.report.card import Card
from llava_cot.trace import Trace
from llava_cot.trace.schema import EVENTS

OUTSIDE = "outside the tree"


@dataclass(frozen=True)
class Account:
    """The cost of a column. ``path`` counts its tokens that are part of a returned answer."""

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
    """Return the share of the drawn tokens that are in no returned answer, in [0, 1]."""
    return max(0.0, 1 - path / tokens) if tokens else 0.0


def accounts(trace: Trace, cards: Mapping[int, Card], headings: Sequence[str]) -> list[Account]:
    """Return an account for each column, and one for the tokens outside the tree, if there are any.

    Tokens outside the tree are those that a scorer let the model write, those of dropped beams, and those that were
    lost or taken back. The time since the previous event belongs to the column that an event is about.
    """
    seconds: dict[tuple[int, bool], float] = defaultdict(float)
    before = 0.0
    for event in trace.events(*EVENTS):
        if ids := event.get("nodes") or event.get("pool"):
            seconds[cards[ids[0]].column, event["event"] == "scored"] += event["seconds"] - before
            before = event["seconds"]
    found = []
    for column, heading in enumerate(headings):
        own = [card for card in cards.values() if card.column == column]
        path = sum(card.tokens for card in own if card.in_answer)
        tokens = sum(card.tokens for card in own)
        found.append(Account(heading, len(own), tokens, path, seconds[column, False], seconds[column, True]))
    outside = trace.data["usage"]["generated_tokens"] - sum(account.tokens for account in found)
    return [*found, Account(OUTSIDE, 0, outside, 0, 0.0, 0.0)] if outside > 0 else found
