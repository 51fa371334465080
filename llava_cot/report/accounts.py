"""Where the tokens and the seconds of a search went, column by column."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llava_cot.report.card import Card
from llava_cot.trace import Trace
from llava_cot.trace.schema import EVENTS

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


def accounts(trace: Trace, cards: Mapping[int, Card], headings: Sequence[str]) -> list[Account]:
    """One for each column, and one for the tokens that are not in the tree: of what a scorer let the model write, of
    beams that were dropped, of a run that was lost.

    The time before an event belongs to what it is about: a stage's seconds run from the event before.
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
