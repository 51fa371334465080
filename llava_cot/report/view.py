"""What both views show: the candidates, rounds and retraces of a trace, and where its tokens and seconds went."""

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from llava_cot.stages import STAGES, parse

TRACE_VERSION = 3  # that can be shown
ORDER = {stage.value: index for index, stage in enumerate(STAGES)}


@dataclass(frozen=True)
class Card:
    """A candidate. ``state`` is "winner" on the path to the answer, else "kept" or "pruned"."""

    id: int
    parent: int
    stage: str | None
    round: int
    seed: int
    text: str
    tokens: int
    logprob: float | None  # mean over its tokens, nats
    score: float | None
    finish: str
    closed: bool
    seconds: float  # from the start of the search to its last token
    state: str
    kept_in: int | None  # the round that went on with it, where that is a later one than its own

    @property
    def label(self) -> str:
        mark = {"winner": "★", "kept": "●", "pruned": "○"}[self.state]
        late = f"{'' if self.state == 'kept' else ', kept'} in round {self.kept_in}" if self.kept_in else ""
        return f"{mark} {self.state}{late}"


@dataclass(frozen=True)
class Pool:
    """What became of a stage in a round."""

    verdict: str
    cutoff: float | None
    carried: list[Card]  # the members that earlier rounds drew


@dataclass(frozen=True)
class Retrace:
    stage: str
    to: str
    round: int  # that begins
    reason: str

    @property
    def headline(self) -> str:
        return f"{self.stage} failed in round {self.round - 1}: back to {self.to}, round {self.round}"


@dataclass(frozen=True)
class Account:
    """What a stage cost; ``path`` are the tokens of the answer."""

    stage: str | None
    candidates: int
    tokens: int
    path: int
    seconds: float


@dataclass(frozen=True)
class View:
    """``cells[round, stage]`` has the candidates in the order they were drawn."""

    search: str
    seed: int
    question: str
    answer: str
    stages: list[str | None]
    rounds: list[int]
    cards: dict[int, Card]
    cells: dict[tuple[int, str | None], list[Card]]
    pools: dict[tuple[int, str | None], Pool]
    retraces: list[Retrace]
    accounts: list[Account]
    generated: int  # tokens drawn, whoever drew them
    path: int  # tokens of the answer
    usage: list[str]

    @property
    def wasted(self) -> float:
        """The share of the drawn tokens that the answer does not have, in [0, 1]."""
        return max(0.0, 1 - self.path / self.generated) if self.generated else 0.0


def read(trace: Mapping[str, Any]) -> View:
    """Of ``trace.data``, or of what ``trace.to_json()`` wrote. Raises ``ValueError`` if it is neither."""
    version = trace.get("version") if isinstance(trace, Mapping) else None
    if version != TRACE_VERSION:
        raise ValueError(f"trace must be a search's trace of version {TRACE_VERSION}, got version {version!r}")
    try:
        return _read(trace)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"trace must be a whole trace, got one with {type(error).__name__}: {error}") from error


def number(value: float | None) -> str:
    if value is None:
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    return f"{value:{'.3f' if abs(value) >= 0.01 or value == 0 else '.2g'}}".replace("-", "−")


def count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def stage_name(stage: str | None) -> str:
    return stage or "ANSWERS"


def _read(trace: Mapping[str, Any]) -> View:
    nodes = {int(node["id"]): node for node in trace["nodes"]}
    path = _path(nodes, int(trace["answer"]))
    decisions = [event for event in trace["events"] if event["event"] == "kept"]
    kept_in = {id: int(d["round"]) for d in decisions for id in d["kept"]}
    cards = {id: _card(node, id in path, kept_in.get(id)) for id, node in nodes.items()}
    cells: dict[tuple[int, str | None], list[Card]] = defaultdict(list)
    for card in cards.values():
        cells[card.round, card.stage].append(card)
    retraces = {(int(r["round"]) - 1, str(r["stage"])): r for r in trace["events"] if r["event"] == "retraced"}
    pools = {(int(d["round"]), _stage(d)): _pool(d, cards, retraces) for d in decisions}
    stages = sorted({card.stage for card in cards.values()}, key=lambda s: (ORDER.get(s or "", len(ORDER)), s or ""))
    text = "".join(nodes[id]["text"] for id in path)
    usage = trace["usage"]
    return View(
        search=str(trace["search"]),
        seed=int(trace["seed"]),
        question=str(trace["question"] or ""),
        answer=parse(text)["CONCLUSION"].text or text.strip(),
        stages=stages,
        rounds=sorted({card.round for card in cards.values()}),
        cards=cards,
        cells=dict(cells),
        pools=pools,
        retraces=[
            Retrace(stage, str(r["to"]), round + 1, pools[round, stage].verdict if (round, stage) in pools else "")
            for (round, stage), r in retraces.items()
        ],
        accounts=_accounts(cards, stages),
        generated=int(usage["generated_tokens"]),
        path=sum(cards[id].tokens for id in path),
        usage=[
            count(int(usage["prompt_tokens"]), "prompt token"),
            f"{count(int(usage['decoded_tokens']), 'token')} computed after the prompt",
            f"{int(usage['steps']):,} forward passes",
            count(int(usage["image_encodings"]), "image encoding"),
            f"{float(usage['seconds']):.2f} s",
        ],
    )


def _path(nodes: Mapping[int, Any], at: int) -> list[int]:
    path: list[int] = []
    while at in nodes:
        if int(nodes[at]["parent"]) >= at:
            raise ValueError(f"node {at} is older than its parent {nodes[at]['parent']}")
        path.insert(0, at)
        at = int(nodes[at]["parent"])
    return path


def _stage(node: Mapping[str, Any]) -> str | None:
    return None if node["stage"] is None else str(node["stage"])


def _score(value: Any) -> float | None:
    """JSON has infinities as strings."""
    return None if value is None else float(value)


def _card(node: Mapping[str, Any], on_path: bool, kept_in: int | None) -> Card:
    logprobs = [float(logprob) for logprob in node["logprobs"]]
    return Card(
        id=int(node["id"]),
        parent=int(node["parent"]),
        stage=_stage(node),
        round=int(node["round"]),
        seed=int(node["seed"]),
        text=str(node["text"]),
        tokens=len(node["tokens"]),
        logprob=fmean(logprobs) if logprobs else None,
        score=_score(node["score"]),
        finish=str(node["finish"]),
        closed=bool(node["closed"]),
        seconds=float(node["seconds"]),
        state="winner" if on_path else "kept" if node["kept"] else "pruned",
        kept_in=kept_in if kept_in != int(node["round"]) else None,
    )


def _pool(decision: Mapping[str, Any], cards: Mapping[int, Card], retraces: Mapping[tuple[int, str], Any]) -> Pool:
    cutoff, score, rank = _score(decision["cutoff"]), _score(decision["score"]), int(decision["pass_rank"])
    members = [cards[id] for id in decision["pool"]]
    closed = [card.score for card in members if card.closed and card.score is not None]
    if cutoff is None:
        verdict = "no cutoff"
    elif score is None:
        verdict = (
            f"{len(closed)} of {len(members)} candidates closed, {rank} must score above the cutoff {number(cutoff)}"
        )
    else:
        which = "best" if rank == 1 else f"{ {2: 'second', 3: 'third'}.get(rank, f'{rank}th') } best"
        best = f" (the best is {number(max(closed, default=None))})" if rank > 1 else ""
        relation = "is above" if score > cutoff else "is not above"
        verdict = f"the {which} score {number(score)}{best} {relation} the cutoff {number(cutoff)}"
    failed = cutoff is not None and (score is None or score <= cutoff)
    place = int(decision["round"]), str(decision["stage"])
    if failed and place not in retraces:
        verdict += "; it goes on with what it has"
    return Pool(verdict, cutoff, [card for card in members if card.round < place[0]])


def _accounts(cards: Mapping[int, Card], stages: list[str | None]) -> list[Account]:
    # Candidates of one stage and round end together, and the next ones begin then.
    seconds: dict[str | None, float] = defaultdict(float)
    before, now = 0.0, 0.0
    for card in cards.values():
        if card.seconds > now:
            before, now = now, card.seconds
            seconds[card.stage] += now - before
    accounts = []
    for stage in stages:
        own = [card for card in cards.values() if card.stage == stage]
        path = sum(card.tokens for card in own if card.state == "winner")
        accounts.append(Account(stage, len(own), sum(card.tokens for card in own), path, seconds[stage]))
    return accounts
