"""The tree in the terminal."""

import io
import json

from helpers.traces import failed, loop, spent, two_retraces
from rich.console import Console

from llava_cot.report.tree import to_tree
from llava_cot.trace import parse_trace


def printed(tree, width=200):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(tree)
    return console.export_text()


def test_rounds_stages_candidates_and_reasons():
    trace = two_retraces()
    out = printed(trace.to_tree())
    assert out == printed(to_tree(parse_trace(trace.to_json())))
    assert "★ winner #6" not in out and "★ winner, kept in round 3 #6 ← #2 0.700" in out
    for part in (
        "round 3",
        "↩ REASONING failed in round 1: back to CAPTION, round 2; the second best score −0.400 (the best is 0.700)",
        "↩ CAPTION failed in round 2: back to CAPTION, round 3",
        "★ winner #",
        "carried over from round 1",
        "answer: 4 & 5",
    ):
        assert part in out
    assert out.count("★") == 4 and out.count("tok  ") == len(trace.data["nodes"])


def test_flaws_other_answers_and_a_spent_budget():
    trace = loop()
    trace.data["nodes"][0]["notes"] = {"judge": 0.5}
    out = printed(trace.to_tree())
    for part in (
        "○ pruned #7 ← #1 0.600 1 tok ✗ unclosed: after PLAN comes LOOK or SAY, got <|/plan|>",
        "○ pruned #12 ← #5 −∞ 1 tok ⚠ no score: the score is nan",
        "★ winner #1 0.900 1 tok judge=0.500  <|plan|>look at 0",
        "● kept #18 ← #13 1.000 1 tok answer 2",
        "answer 2: #18 1.000 1",
        "5 in the answers",
    ):
        assert part in out
    assert "■ budget spent after 0.0" in printed(spent().to_tree())


def test_a_failed_search_is_shown_as_far_as_it_came():
    out = printed(failed().to_tree())
    assert "✗ failed: RuntimeError: out of memory </script>" in out and "answer:" not in out
    assert "REASONING" in out and "⚠ no score: RuntimeError" in out and "★" not in out


def test_what_a_model_wrote_neither_is_markup_nor_steers_the_terminal():
    data = json.loads(two_retraces().to_json())
    data["nodes"][0]["text"] = "[bold]x[/] \x1b[2J\x9b31m \ud83d"
    out = printed(to_tree(parse_trace(data)))
    assert "[bold]x[/] ·[2J·31m ·" in out and "\x1b" not in out and "\x9b" not in out
