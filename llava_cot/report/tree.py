"""A trace as a tree in the terminal: rounds, their stages, the candidates, and why a round went back."""

import unicodedata
from collections.abc import Mapping
from typing import Any

from rich.text import Text
from rich.tree import Tree

from llava_cot.report.view import Card, number, read, stage_name

STYLES = {"winner": "bold green", "kept": "cyan", "pruned": "dim"}


def to_tree(trace: Mapping[str, Any]) -> Tree:
    """Of ``trace.data`` or of its JSON; raises ``ValueError`` if it is not a trace."""
    view = read(trace)
    tree = Tree(Text(f"{view.search} · seed {view.seed}  {_line(view.question)}", "bold"))
    for round in view.rounds:
        branch = tree.add(Text(f"round {round}", "bold"))
        for stage in view.stages:
            if (round, stage) not in view.cells:
                continue
            pool = view.pools.get((round, stage))
            heading = Text(stage_name(stage), "bold")
            cell = branch.add(heading.append(f"  {pool.verdict}" if pool else "", "not bold dim"))
            for card in view.cells[round, stage]:
                cell.add(_candidate(card))
            for card in pool.carried if pool else ():
                cell.add(Text(f"⤴ #{card.id} {number(card.score)} carried over from round {card.round}", "dim"))
        for retrace in view.retraces:
            if retrace.round == round + 1:
                branch.add(Text(f"↩ {retrace.headline}; {retrace.reason}", "yellow"))
    tree.add(Text(f"answer: {_line(view.answer)}", "bold green"))
    tokens = f"{view.generated} tokens drawn, {view.path} in the answer, {view.wasted:.0%} wasted"
    tree.add(Text(f"{tokens}; {', '.join(view.usage)}", "dim"))
    return tree


def _candidate(card: Card) -> Text:
    line = Text(no_wrap=True, overflow="ellipsis", style=STYLES[card.state])
    line.append(f"{card.label} #{card.id} {number(card.score)} {card.tokens} tok")
    line.append("" if card.closed else f" ✗ unclosed ({card.finish})", "red")
    return line.append(f"  {_line(card.text)}")


def _line(text: str) -> str:
    """On one line, and without what would steer the terminal."""
    return "".join("·" if unicodedata.category(char) in ("Cc", "Cs") else char for char in " ".join(text.split()))
