"""Collect what all reports show: a trace's candidates, rounds, retraces and answers, and the flaws of the best one."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llava_cot.report.accounts import Account, accounts, wasted
from llava_cot.report.card import Card
from llava_cot.report.columns import columns
from llava_cot.report.decisions import Pool, Retrace, pools, retraces
from llava_cot.report.numbers import count
from llava_cot.stages import Grammar, Outcome
from llava_cot.text import normalise
from llava_cot.trace import Trace
from llava_cot.trace.schema import NodeData, UsageData


@dataclass(frozen=True)
class View:
    """What a report shows of a trace. ``cells[round, column]`` holds candidates in the order of drawing."""

    search: str
    seed: int
    question: str
    answer: str  # empty if there is none
    is_running: bool  # whether the search was still running
    failure: str | None  # the exception that ended a failed search
    others: list[tuple[Card, str]]  # the last candidate and the answer of each returned answer after the first
    malformed: str | None  # how the answer is malformed; None if it is not
    tags: list[str]
    headings: list[str]  # one for each column
    rounds: list[int]
    cards: dict[int, Card]
    cells: dict[tuple[int, int], list[Card]]
    pools: dict[tuple[int, int], Pool]
    retraces: list[Retrace]
    spent: str | None  # says that the budget was spent, and on what; None if it was not
    accounts: list[Account]
    generated: int  # tokens drawn, those for scorers included
    path: int  # tokens of the returned answers
    seconds: float
    usage: list[str]

    @property
    def has_answer(self) -> bool:
        return self.failure is None and not self.is_running

    @property
    def wasted(self) -> float:
        return wasted(self.generated, self.path)

    def after(self, round: int) -> list[Retrace]:
        """Return the retraces that are shown between the row of this round and the next."""
        later = min((other for other in self.rounds if other > round), default=math.inf)
        return [retrace for retrace in self.retraces if round < retrace.round <= later]

    def is_right(self, gold: str) -> bool:
        return self.has_answer and normalise(gold) == normalise(self.answer)

    def stage_of(self, card: Card) -> str:
        """Return the stage of a candidate, or "" if the heading of its column already says it."""
        return card.stage if card.stage is not None and "/" in self.headings[card.column] else ""


def read(trace: Trace) -> View:
    """Read from a trace what there is to show."""
    nodes, usage, grammar = trace.nodes, trace.data["usage"], trace.grammar
    ids = list(dict.fromkeys([trace.data["answer"], *trace.data["answers"]]))  # None if there is no answer
    paths = [[node["id"] for node in trace.path(id)] for id in ids]
    headings, column_of = columns(nodes, trace.drawn_after_budget, grammar.names)
    kept_in = {id: event["round"] for event in trace.events("kept") for id in event["kept"]}
    places = {id: place for place, id in enumerate(ids, 1)}
    in_answer = {id for path in paths for id in path}
    states = _states(trace, paths[0])
    cards = {
        id: _card(
            node,
            column=column_of[id],
            state=states[id],
            kept_in=kept_in.get(id) if kept_in.get(id) != node["round"] else None,
            in_answer=id in in_answer,
            answer=places.get(id),
        )
        for id, node in nodes.items()
    }
    cells: dict[tuple[int, int], list[Card]] = defaultdict(list)
    for card in cards.values():
        cells[card.round, card.column].append(card)
    decided = pools(trace, cards)
    texts = [trace.text(id) for id in ids]
    ended = [id is not None and nodes[id]["finish"] == "eos" for id in ids]
    return View(
        search=trace.data["search"],
        seed=trace.data["seed"],
        question=trace.data["question"] or "",
        answer=_conclusion(grammar, texts[0], ended[0]),
        is_running=trace.is_running,
        failure=trace.failure,
        others=[
            (cards[path[-1]], _conclusion(grammar, text, whole))
            for path, text, whole in zip(paths[1:], texts[1:], ended[1:])
        ],
        malformed=_malformed(grammar, texts[0], [cards[id] for id in paths[0]], ended[0]) if paths[0] else None,
        tags=grammar.all_tags,
        headings=headings,
        rounds=sorted({card.round for card in cards.values()}),
        cards=cards,
        cells=dict(cells),
        pools=decided,
        retraces=retraces(trace, cards, headings, decided),
        spent=_spent(trace),
        accounts=accounts(trace, cards, headings),
        generated=usage["generated_tokens"],
        path=sum(cards[id].tokens for id in in_answer),
        seconds=usage["seconds"],
        usage=_usage(usage),
    )


def _states(trace: Trace, winners: Sequence[int]) -> dict[int, str]:
    """Return the state of each candidate by id: of the fields of ``Card``, the one of that name."""
    states = {id: "kept" if node["kept"] else "pruned" for id, node in trace.nodes.items()}
    if trace.is_running:
        decided = {id for event in trace.events("kept") for id in event["pool"]}
        states |= {id: "drawn" for id, state in states.items() if state == "pruned" and id not in decided}
    return states | dict.fromkeys(winners, "winner")


def _card(node: NodeData, **places: Any) -> Card:
    return Card(
        id=node["id"],
        parent=node["parent"],
        stage=node["stage"],
        round=node["round"],
        seed=node["seed"],
        text=node["text"],
        tokens=len(node["tokens"]),
        logprob=_mean(node["logprobs"]),
        sampling_logprob=_mean(node["sampling_logprobs"]),
        score=node["score"],
        finish=node["finish"] or "nothing",
        closed=node["closed"],
        violation=node["violation"],
        error=node["error"],
        notes=node["notes"],
        seconds=node["seconds"],
        **places,
    )


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _conclusion(grammar: Grammar, text: str, ended: bool) -> str:
    return grammar.parse(text, ended=ended)[grammar.conclusion].text or text.strip()


def _malformed(grammar: Grammar, text: str, path: Sequence[Card], ended: bool) -> str | None:
    """Say how an answer is malformed: a candidate left the grammar, no conclusion, or tags that do not pair.

    A missing stage is not malformed.
    """
    for card in path:
        if card.violation:  # an unclosed one may have been finished by the next
            return f"#{card.id}: {card.violation}"
    outcome = grammar.parse(text, ended=ended)[grammar.conclusion].outcome
    if outcome is not Outcome.COMPLETE:
        return f"{grammar.conclusion} is {outcome}"
    names = grammar.names
    if not all(map(all, map(grammar.tag_pair, names))):
        return None  # where a stage has no tags of its own, its place is its only sign
    anything = Grammar(
        {name: () if name == grammar.conclusion else names for name in names},
        start=names,
        max_visits=dict.fromkeys(names, len(text)),
        tags=grammar.tags,
    )
    return anything.violation(text)


def _spent(trace: Trace) -> str | None:
    spent = trace.events("budget_spent")
    if not spent:
        return None
    what, answer = spent[0]["what"], trace.data["answer"]
    limit, value = (trace.data["config"].get("budget") or {}).get(what), spent[0].get("spent")
    numbers = "".join(f"{before}{n:,.6g}" for before, n in ((": ", value), (" of ", limit)) if n is not None)
    which = "what was finished greedily" if answer in trace.drawn_after_budget else "the best so far"
    end = f"; #{answer} is {which}" if answer is not None else ""
    return f"budget spent after {spent[0]['seconds']:.2f} s, {what.replace('_', ' ')}{numbers}{end}"


def _usage(usage: UsageData) -> list[str]:
    asked = {"drawn": usage["generations"], "given to a scorer": usage["scorer_calls"]}
    return [
        count(usage["prompt_tokens"], "prompt token"),
        f"{count(usage['decoded_tokens'], 'token')} computed after the prompt",
        *([f"{count(drafted, 'token')} drafted"] if (drafted := usage["drafted_tokens"]) else []),
        *(f"{count(number, 'candidate')} {what}" for what, number in asked.items() if number),
        f"{usage['steps']:,} forward passes",
        count(usage["image_encodings"], "image encoding"),
        f"{usage['seconds']:.2f} s",
    ]
