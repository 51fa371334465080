"""What all views show: the candidates, rounds and retraces of a trace, its answers and what is wrong with the best."""

import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from llava_cot.report.accounts import Account, accounts, wasted
from llava_cot.report.card import Card
from llava_cot.report.columns import columns
from llava_cot.report.decisions import Pool, Retrace, pools, retraces
from llava_cot.report.numbers import count
from llava_cot.stages import Grammar, Outcome
from llava_cot.text import normalise

TRACE_VERSION = 3  # that can be shown
CANDIDATES = {"generations": "drawn", "scorer_calls": "given to a scorer"}


@dataclass(frozen=True)
class View:
    """``cells[round, column]`` has the candidates in the order they were drawn."""

    search: str
    seed: int
    question: str
    answer: str
    others: list[tuple[Card, str]]  # the last candidate and the answer of each that was returned besides the first
    malformed: str | None  # what is wrong with the answer's form
    tags: list[str]
    headings: list[str]  # of the columns
    rounds: list[int]
    cards: dict[int, Card]
    cells: dict[tuple[int, int], list[Card]]
    pools: dict[tuple[int, int], Pool]
    retraces: list[Retrace]
    spent: str | None  # of the budget
    accounts: list[Account]
    generated: int  # tokens drawn, whoever drew them
    path: int  # tokens of the returned answers
    seconds: float
    usage: list[str]

    @property
    def wasted(self) -> float:
        return wasted(self.generated, self.path)

    def after(self, round: int) -> list[Retrace]:
        """The retraces that stand between this round's row and the next."""
        later = min((other for other in self.rounds if other > round), default=math.inf)
        return [retrace for retrace in self.retraces if round < retrace.round <= later]

    def is_right(self, gold: str) -> bool:
        return normalise(gold) == normalise(self.answer)

    def stage_of(self, card: Card) -> str:
        """The stage of a candidate, where its column's heading does not say it."""
        return card.stage if card.stage is not None and "/" in self.headings[card.column] else ""


def read(trace: Mapping[str, Any]) -> View:
    """Of ``trace.data``, or of what ``trace.to_json()`` wrote. Raises ``ValueError`` if it is neither."""
    version = trace.get("version") if isinstance(trace, Mapping) else None
    if version != TRACE_VERSION:
        raise ValueError(f"trace must be a search's trace of version {TRACE_VERSION}, got version {version!r}")
    try:
        return _read(trace)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"trace must be a whole trace, got one with {type(error).__name__}: {error}") from error


def _read(trace: Mapping[str, Any]) -> View:
    nodes, events, usage = _nodes(trace), trace["events"], trace["usage"]
    grammar = Grammar(**trace["grammar"])
    answers = [int(trace["answer"]), *(int(id) for id in trace["answers"] if id != trace["answer"])]
    paths = [_path(nodes, id) for id in answers]
    headings, column_of = columns(nodes, _greedy(events), grammar.names)
    kept_in = {id: int(e["round"]) for e in events if e["event"] == "kept" for id in e["kept"]}
    places = {id: place for place, id in reversed([*enumerate(answers, 1)])}
    in_answer = {id for path in paths for id in path}
    cards = {
        id: _card(
            node,
            column=column_of[id],
            state="winner" if id in paths[0] else "kept" if node["kept"] else "pruned",
            kept_in=kept_in.get(id) if kept_in.get(id) != int(node["round"]) else None,
            in_answer=id in in_answer,
            answer=places.get(id),
        )
        for id, node in nodes.items()
    }
    cells: dict[tuple[int, int], list[Card]] = defaultdict(list)
    for card in cards.values():
        cells[card.round, card.column].append(card)
    decided = pools(events, cards, trace["config"])
    generated = int(usage["generated_tokens"])
    texts = ["".join(cards[id].text for id in path) for path in paths]
    return View(
        search=str(trace["search"]),
        seed=int(trace["seed"]),
        question=str(trace["question"] or ""),
        answer=_conclusion(grammar, texts[0]),
        others=[(cards[path[-1]], _conclusion(grammar, text)) for path, text in zip(paths[1:], texts[1:]) if path],
        malformed=_malformed(grammar, texts[0], [cards[id] for id in paths[0]]),
        tags=[tag for name in grammar.names for tag in grammar.tag_pair(name)],
        headings=headings,
        rounds=sorted({card.round for card in cards.values()}),
        cards=cards,
        cells=dict(cells),
        pools=decided,
        retraces=retraces(events, cards, headings, decided),
        spent=_spent(trace, answers[0], _greedy(events)),
        accounts=accounts(cards, headings, events, generated),
        generated=generated,
        path=sum(cards[id].tokens for id in in_answer),
        seconds=float(usage["seconds"]),
        usage=_usage(usage),
    )


def _nodes(trace: Mapping[str, Any]) -> dict[int, Any]:
    nodes = {int(node["id"]): node for node in trace["nodes"]}
    for id, node in nodes.items():
        if int(node["parent"]) >= id:
            raise ValueError(f"node {id} is older than its parent {node['parent']}")
    return dict(sorted(nodes.items()))


def _path(nodes: Mapping[int, Any], at: int) -> list[int]:
    path: list[int] = []
    while at in nodes:
        path.insert(0, at)
        at = int(nodes[at]["parent"])
    return path


def _greedy(events: Sequence[Mapping[str, Any]]) -> set[int]:
    """What was drawn once the budget was spent."""
    kinds = [event["event"] for event in events]
    start = kinds.index("budget_spent") if "budget_spent" in kinds else len(events)
    return {int(id) for event in events[start:] if event["event"] == "generated" for id in event["nodes"]}


def _card(node: Mapping[str, Any], **places: Any) -> Card:
    return Card(
        id=int(node["id"]),
        parent=int(node["parent"]),
        stage=None if node["stage"] is None else str(node["stage"]),
        round=int(node["round"]),
        seed=int(node["seed"]),
        text=str(node["text"]),
        tokens=len(node["tokens"]),
        logprob=_mean(node["logprobs"]),
        sampling_logprob=_mean(node["sampling_logprobs"]),
        score=None if node["score"] is None else float(node["score"]),  # JSON has infinities as strings
        finish=str(node["finish"] or "nothing"),
        closed=bool(node["closed"]),
        violation=None if node["violation"] is None else str(node["violation"]),
        error=None if node["error"] is None else str(node["error"]),
        notes={str(name): float(value) for name, value in node["notes"].items()},
        seconds=float(node["seconds"]),
        **places,
    )


def _mean(values: Sequence[float]) -> float | None:
    return fmean(map(float, values)) if values else None


def _conclusion(grammar: Grammar, text: str) -> str:
    return grammar.parse(text)[grammar.conclusion].text or text.strip()


def _malformed(grammar: Grammar, text: str, path: Sequence[Card]) -> str | None:
    """No conclusion, tags that do not pair, or a candidate on the way that left the grammar; a stage may be missing."""
    for card in path:
        if card.violation:  # one that is just unclosed may have been finished by the next
            return f"#{card.id}: {card.violation}"
    outcome = grammar.parse(text)[grammar.conclusion].outcome
    if outcome is not Outcome.COMPLETE:
        return f"{grammar.conclusion} is {outcome}"
    names = grammar.names
    anything = Grammar(
        {name: () if name == grammar.conclusion else names for name in names},
        start=names,
        max_visits=dict.fromkeys(names, len(text)),
        tags=grammar.tags,
    )
    return anything.violation(text)


def _spent(trace: Mapping[str, Any], answer: int, greedy: Collection[int]) -> str | None:
    spent = [event for event in trace["events"] if event["event"] == "budget_spent"]
    if not spent:
        return None
    what = str(spent[0]["what"])
    config = trace["config"] if isinstance(trace["config"], Mapping) else {}
    limit, value = (config.get("budget") or {}).get(what), spent[0].get("spent")
    numbers = "".join(f"{before}{float(n):,.6g}" for before, n in ((": ", value), (" of ", limit)) if n is not None)
    end = f"#{answer} is what was finished greedily" if answer in greedy else f"#{answer} is the best so far"
    return f"budget spent after {float(spent[0]['seconds']):.2f} s, {what.replace('_', ' ')}{numbers}; {end}"


def _usage(usage: Mapping[str, Any]) -> list[str]:
    return [
        count(int(usage["prompt_tokens"]), "prompt token"),
        f"{count(int(usage['decoded_tokens']), 'token')} computed after the prompt",
        *(f"{count(int(usage[name]), 'candidate')} {what}" for name, what in CANDIDATES.items() if usage[name]),
        f"{int(usage['steps']):,} forward passes",
        count(int(usage["image_encodings"]), "image encoding"),
        f"{float(usage['seconds']):.2f} s",
    ]
