"""The decisions of a search: which pools passed, which failed, and where it went back to."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llava_cot.report.card import Card
from llava_cot.report.numbers import number
from llava_cot.trace import Trace


@dataclass(frozen=True)
class Pool:
    """The pool of a column in a round, and what was decided about it."""

    verdict: str  # empty if the pool had nothing to pass
    cutoff: float | None
    carried: list[Card]  # the members that were drawn in earlier rounds


@dataclass(frozen=True)
class Retrace:
    stage: str
    to: str
    start: int  # column
    end: int  # column
    round: int  # the round that begins
    reason: str

    @property
    def headline(self) -> str:
        return f"{self.stage} failed in round {self.round - 1}: back to {self.to}, round {self.round}"


def pools(trace: Trace, cards: Mapping[int, Card]) -> dict[tuple[int, int], Pool]:
    """Return the pools by round and column. The column is that of the first member that was drawn in the round."""
    agreement = trace.data["config"].get("cutoff_agreement")
    decisions = trace.events("kept", "retraced")
    found = {}
    for event, after in zip(decisions, [*decisions[1:], {"event": ""}]):
        if event["event"] == "kept" and event["pool"]:
            members = [cards[id] for id in event["pool"]]
            round = event["round"]
            column = next((card.column for card in members if card.round == round), members[0].column)
            verdict = _verdict(event, members, after["event"] == "retraced", agreement)
            carried = [card for card in members if card.round < round]
            found[round, column] = Pool(verdict, event["cutoff"], carried)
    return found


def retraces(
    trace: Trace, cards: Mapping[int, Card], headings: Sequence[str], pools: Mapping[tuple[int, int], Pool]
) -> list[Retrace]:
    """Return the retraces. Each leads from the column of the decision before it to the column that is drawn next.

    If nothing is drawn there any more, because the search is at that point or its budget ended, it leads to where its
    stage was drawn before. An answer that a spent budget finishes greedily is of no stage.
    """
    events = trace.events("kept", "retraced", "generated")
    found, start = [], 0
    for place, event in enumerate(events):
        if event["event"] == "kept" and event["pool"]:
            start = max(cards[id].column for id in event["pool"])
        if event["event"] == "retraced":
            stage, to, round = event["stage"], event["to"], event["round"]
            drawn = (later["nodes"] for later in events[place + 1 :] if later["event"] == "generated")
            ids: Sequence[int] = next(drawn, ())
            if not any(cards[id].stage for id in ids):
                ids = [card.id for card in cards.values() if card.stage == to and card.column <= start][-1:]
            end = cards[ids[0]].column if ids else 0
            pool = pools.get((round - 1, start))
            reason = pool.verdict if pool and pool.verdict else _reason(event)
            found.append(Retrace(_step(stage, headings[start]), _step(to, headings[end]), start, end, round, reason))
    return found


def _step(stage: str, heading: str) -> str:
    """Return the name of a stage, with its step if it has several columns."""
    return heading if heading.startswith(f"{stage} · step ") else stage


def _verdict(event: Mapping[str, Any], members: Sequence[Card], is_retraced: bool, agreement: float | None) -> str:
    cutoff, score, rank = event["cutoff"], event["score"], event["pass_rank"]
    if cutoff is None:
        wanted = f"{agreement:.0%} of the {len(members)} candidates say the same" if agreement else ""
        return f"fewer than {wanted}" if is_retraced and wanted else ""
    closed = [card.score for card in members if card.closed and card.score is not None]
    if score is None:
        verdict = (
            f"{len(closed)} of {len(members)} candidates closed, {rank} must score above the cutoff {number(cutoff)}"
        )
    else:
        which = "best" if rank == 1 else f"{ {2: 'second', 3: 'third'}.get(rank, f'{rank}th') } best"
        best = f" (the best is {number(max(closed, default=None))})" if rank > 1 else ""
        relation = "is above" if score > cutoff else "is not above"
        verdict = f"the {which} score {number(score)}{best} {relation} the cutoff {number(cutoff)}"
    failed = score is None or score <= cutoff
    is_mixed = len({card.stage for card in members}) > 1  # then each has to pass the cutoff of its own stage
    return verdict if is_retraced or is_mixed or not failed else f"{verdict}; it goes on with what it has"


def _reason(event: Mapping[str, Any]) -> str:
    """Return the reason that the search itself gives, for a retrace without a pool."""
    score, cutoff = event["score"], event["cutoff"]
    if score is None or cutoff is None:
        return event["reason"]
    return f"{number(score)} is not above the cutoff {number(cutoff)}"
