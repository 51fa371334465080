"""Show a trace as a tree in the terminal: rounds, their stages, the candidates, and the reasons for retraces."""

import unicodedata

from rich.text import Text
from rich.tree import Tree

from llava_cot.report.card import Card
from llava_cot.report.numbers import number
from llava_cot.report.view import View, read
from llava_cot.trace import Trace

STYLES = {"winner": "bold green", "kept": "cyan", "pruned": "dim", "drawn": ""}


def to_tree(trace: Trace) -> Tree:
    """Return the tree of a trace, for ``rich`` to print."""
    view = read(trace)
    tree = Tree(Text(one_line(f"{view.search} · seed {view.seed}  {view.question}"), "bold"))
    for round in view.rounds:
        branch = tree.add(Text(f"round {round}", "bold"))
        for column in range(len(view.headings)):
            if (round, column) in view.cells:
                _add_cell(branch, view, round, column)
        for retrace in view.after(round):
            branch.add(Text(one_line(f"↩ {retrace.headline}; {retrace.reason}"), "yellow"))
    if view.spent:
        tree.add(Text(one_line(f"■ {view.spent}"), "yellow"))
    if view.is_running:
        tree.add(Text("… running: there is no answer yet", "bold cyan"))
    elif view.failure is None:
        tree.add(Text(f"answer: {one_line(view.answer)}", "bold green"))
    else:
        tree.add(Text(f"✗ failed: {one_line(view.failure)}", "bold red"))
    if view.malformed:
        tree.add(Text(one_line(f"✗ malformed: {view.malformed}"), "red"))
    for card, answer in view.others:
        tree.add(Text(f"{card.returned}: #{card.id} {number(card.score)} {one_line(answer)}", "cyan"))
    which = "answers" if view.others else "answer"
    tokens = f"{view.generated} tokens drawn"
    tokens += "" if view.is_running else f", {view.path} in the {which}, {view.wasted:.0%} wasted"
    tree.add(Text(f"{tokens}; {', '.join(view.usage)}", "dim"))
    return tree


def one_line(text: str) -> str:
    """Return ``text`` on one line, without control characters that would affect the terminal."""
    return "".join("·" if unicodedata.category(char) in ("Cc", "Cs") else char for char in " ".join(text.split()))


def _add_cell(branch: Tree, view: View, round: int, column: int) -> None:
    pool = view.pools.get((round, column))
    heading = Text(one_line(view.headings[column]), "bold")
    cell = branch.add(heading.append(f"  {pool.verdict}" if pool and pool.verdict else "", "not bold dim"))
    for card in view.cells[round, column]:
        cell.add(_candidate(view, card))
    for card in pool.carried if pool else ():
        cell.add(Text(f"⤴ #{card.id} {number(card.score)} carried over from round {card.round}", "dim"))


def _candidate(view: View, card: Card) -> Text:
    line = Text(no_wrap=True, overflow="ellipsis", style=STYLES[card.state])
    parent = f" ← #{card.parent}" if card.parent in view.cards else ""
    line.append(f"{card.label} #{card.id}{parent} {number(card.score)} {card.tokens} tok")
    line.append(f" {one_line(view.stage_of(card))}" if view.stage_of(card) else "", "bold")
    line.append(f" {card.returned}" if card.returned else "", "green")
    line.append(f" ✗ {one_line(card.flaw)}" if card.flaw else "", "red")
    line.append(f" ⚠ no score: {one_line(card.error)}" if card.error else "", "red")
    line.append("".join(f" {one_line(name)}={number(value)}" for name, value in card.notes.items()))
    return line.append(f"  {one_line(card.text)}")
