"""The tree in the terminal."""

import io
import json

from helpers.traces import two_retraces
from rich.console import Console

from llava_cot.report.tree import to_tree


def printed(tree, width=200):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(tree)
    return console.export_text()


def test_rounds_stages_candidates_and_reasons():
    trace = two_retraces()
    out = printed(trace.to_tree())
    assert out == printed(to_tree(json.loads(trace.to_json())))
    for part in (
        "round 3",
        "↩ REASONING failed in round 1: back to CAPTION, round 2; the second best score −0.400 (the best is 0.700)",
        "↩ CAPTION failed in round 2: back to CAPTION, round 3",
        "★ winner #",
        "★ winner, kept in round 3 #",
        "carried over from round 1",
        "answer: 4 & 5",
    ):
        assert part in out
    assert out.count("★") == 4 and out.count("tok  ") == len(trace.data["nodes"])


def test_what_a_model_wrote_neither_is_markup_nor_steers_the_terminal():
    data = json.loads(two_retraces().to_json())
    data["nodes"][0]["text"] = "[bold]x[/] \x1b[2J\x9b31m \ud83d"
    out = printed(to_tree(data))
    assert "[bold]x[/] ·[2J·31m ·" in out and "\x1b" not in out and "\x9b" not in out
