"""Traces of searches that have not ended, read between the steps of a real engine."""

import json

import pytest
from helpers.page import Page
from helpers.traces import HOSTILE, failed, loop, sentences, spent, two_retraces
from PIL import Image
from rich.console import Console

from llava_cot.data import shapes
from llava_cot.report.html import to_fragment, to_html
from llava_cot.report.summary import Entry, summarise
from llava_cot.trace import parse_trace


def printed(trace):
    console = Console(width=200, color_system=None)
    with console.capture() as capture:
        console.print(trace.to_tree())
    return capture.get()


def read_at_each_event(generator, search, **settings):
    """The final trace of a search, and those that were read after an event while it was running."""
    sample, events = shapes.sample(shapes.TEST_SEEDS[3]), []
    plan = generator.plan_of_stream(search, **settings)
    run = generator.submit(sample.image, sample.question, plan, seed=5, on_event=events.append)
    found = []
    while not run.done:
        before = len(events)
        generator.engine.step()
        if len(events) > before and not run.done:
            found.append(generator.trace_of(run, None))
    return generator.answer_of(run).trace, found


def test_a_search_with_two_retraces_is_seen_as_it_comes(tiny):
    final, found = read_at_each_event(tiny, "swires")
    assert len(final.events("retraced")) == 2 and not final.is_running
    for trace in found:
        read = parse_trace(trace.to_json())
        assert read == trace and trace.is_running and trace.data["answers"] == []
        page = Page(to_fragment(trace))
        assert "runningthere is no answer yet" in page.text and "wasted" in page.text and "%" not in page.text
        assert {*page.cards} == {f"n{node['id']}" for node in trace.data["nodes"]} and not page.open
        states = {a["data-state"] for tag, a in page.elements if tag == "article"}
        assert states <= {"kept", "pruned"}
        arrows = sum(tag == "svg" and a.get("class") == "arrow" for tag, a in page.elements)
        assert arrows == len(trace.events("retraced"))
        assert "… running: there is no answer yet" in printed(trace) and "wasted" not in printed(trace)
    assert len(found[-1].events("retraced")) == 2
    assert [len(trace.nodes) for trace in found] == sorted({len(trace.nodes) for trace in found})


@pytest.mark.parametrize("search", ["best_of_n", "sentence_beam", "swires"])
def test_reading_does_not_change_a_search(tiny, search):
    final, found = read_at_each_event(tiny, search)
    sample = shapes.sample(shapes.TEST_SEEDS[3])
    undisturbed = tiny.answer(sample.image, sample.question, search, seed=5).trace
    strip = lambda trace: json.loads(trace.to_json(), object_hook=lambda o: {**o, "seconds": 0})  # noqa: E731
    assert strip(final) == strip(undisturbed)
    for trace in found:
        parse_trace(trace.to_json())
        to_fragment(trace)


def cut(trace, kind, count):
    """The trace as it was right after its ``count``-th event of ``kind``."""
    data = json.loads(trace.to_json())
    places = [place for place, event in enumerate(data["events"]) if event["event"] == kind]
    events = data["events"][: places[count - 1] + 1]
    drawn = {id for event in events if event["event"] == "generated" for id in event["nodes"]}
    decided = {id for event in events if event["event"] == "kept" for id in event["kept"]}
    nodes = [{**node, "kept": node["id"] in decided} for node in data["nodes"] if node["id"] in drawn]
    return parse_trace({**data, "nodes": nodes, "events": events, "answer": None, "answers": []})


def test_what_nothing_has_been_decided_about_is_neither_kept_nor_pruned():
    trace = cut(two_retraces(), "generated", 3)
    page = Page(to_fragment(trace))
    states = [a["data-state"] for tag, a in page.elements if tag == "article"]
    new = len(trace.events("generated")[2]["nodes"])
    assert {*states[:-new]} == {"kept", "pruned"} and {*states[-new:]} == {"drawn"}
    assert page.text.count("◌ drawn") == new and printed(trace).count("◌ drawn") == new


def test_a_retrace_points_at_the_stage_that_is_drawn_again():
    trace = cut(two_retraces(), "retraced", 1)
    fragment = to_fragment(trace)
    assert "↩ REASONING failed in round 1: back to CAPTION, round 2" in Page(fragment).text
    assert '<svg x="50.00%" overflow="visible"><path' in fragment  # CAPTION is the second of three columns


def test_among_many_it_has_no_answer():
    row = summarise(Entry(cut(two_retraces(), "kept", 1), gold="4"))
    assert (row.failure, row.is_right, row.answer) == ("the search was still running", False, "")


@pytest.mark.parametrize("make", [two_retraces, loop, sentences, spent, failed])
def test_a_fragment_is_the_body_of_the_page(make):
    trace, picture = make(), Image.new("RGB", (8, 8), "red")
    given = {"image": picture, "gold": HOSTILE, "question": "\ud83d\0 why?"}
    assert f"<body>{to_fragment(trace, **given)}<script>" in to_html(trace, **given)
    assert trace.to_fragment(gold="4") == to_fragment(trace, gold="4")
    to_fragment(trace).encode()
