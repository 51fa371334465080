"""What is read as a trace, what is not, and that everything that is written can be read again."""

import json
import math
import subprocess
import sys

import pytest
from helpers.traces import failed, loop, sentences, spent, two_retraces

from llava_cot.core import Usage
from llava_cot.data import shapes
from llava_cot.search import POLICIES, Budget
from llava_cot.stages import LLAVA_COT
from llava_cot.trace import (
    TRACE_VERSION,
    Record,
    TraceError,
    holds_many,
    parse_trace,
    read_trace,
    read_traces,
    scan_traces,
    trace_data,
)

TRACES = (two_retraces, loop, sentences, spent, failed)


@pytest.mark.parametrize("make", TRACES)
def test_what_is_written_is_read(make):
    trace = make()
    assert parse_trace(trace.to_json()).data == parse_trace(trace.data).data == trace.data


@pytest.mark.parametrize("search", POLICIES)
def test_what_every_policy_writes_is_read(tiny, search):
    sample = shapes.sample(500_010)
    budget = Budget(generated_tokens=60)  # so that a policy tells of this too
    trace = tiny.answer(sample.image, sample.question, search, max_new_tokens=50, budget=budget).trace
    assert parse_trace(trace.to_json()).to_json() == trace.to_json()


def test_numbers_that_json_has_not():
    data = json.loads(two_retraces().to_json())
    data["nodes"][0] |= {"score": "-inf", "notes": {"judge": "nan"}, "logprobs": ["-inf", -1]}
    node = parse_trace(data).data["nodes"][0]
    assert node["score"] == -math.inf and math.isnan(node["notes"]["judge"]) and node["logprobs"] == [-math.inf, -1]
    assert json.loads(parse_trace(data).to_json()) == data


def test_fields_and_events_that_the_schema_does_not_have_are_kept():
    data = json.loads(two_retraces().to_json()) | {"comment": {"by": "me"}}
    data["events"].append({"event": "mine", "seconds": 1, "nodes": "anything"})
    assert parse_trace(data).data == data


def at(*path, value):
    """A trace with another value at a place; ``...`` removes it."""
    data = json.loads(two_retraces().to_json())
    place = data
    for step in path[:-1]:
        place = place[step]
    if value is ...:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return data


def of_kind(kind):
    return next(place for place, event in enumerate(two_retraces().data["events"]) if event["event"] == kind)


@pytest.mark.parametrize(
    "data, message",
    [
        ([], "trace must be an object, got list"),
        (None, "trace must be an object, got NoneType"),
        ({}, f"trace.version must be {TRACE_VERSION}, got None"),
        (at("version", value=3), "trace.version must be 7, got 3"),
        (at("nodes", value=None), "trace.nodes must be a list, got None"),
        (at("nodes", 2, "text", value=...), "trace.nodes[2].text must be a string, but it is missing"),
        (at("nodes", 2, "tokens", value=[1, "2"]), "trace.nodes[2].tokens[1] must be an integer, got '2'"),
        (at("nodes", 2, "tokens", value=[1, 2.0]), "trace.nodes[2].tokens[1] must be an integer, got 2.0"),
        (at("nodes", 2, "round", value=True), "trace.nodes[2].round must be an integer, got True"),
        (at("nodes", 2, "seed", value=10**400), "trace.nodes[2].seed must be an integer, got 1000"),
        (at("nodes", 2, "score", value="high"), "trace.nodes[2].score must be a number or null, got 'high'"),
        (at("nodes", 2, "notes", value={"a": None}), "trace.nodes[2].notes['a'] must be a number, got None"),
        (at("nodes", 2, "stage", value="LOOK"), "trace.nodes[2].stage must be null or one of ['SUMMARY', "),
        (at("nodes", 2, "id", value=1), "trace.nodes[2].id must be one that no other node has, and not 0, got 1"),
        (at("nodes", 2, "parent", value=4), "trace.nodes[2].parent must be 0 or the id of a node before it, got 4"),
        (at("nodes", 2, "parent", value=3), "trace.nodes[2].parent must be 0 or the id of a node before it, got 3"),
        (at("events", 1, "seconds", value="now"), "trace.events[1].seconds must be a number, got 'now'"),
        (at("events", of_kind("kept"), "pool", value=...), "].pool must be a list, but it is missing"),
        (at("events", of_kind("kept"), "pool", value=[99]), "].pool must name nodes of the trace, got 99"),
        (at("events", of_kind("retraced"), "to", value=None), "].to must be a string, got None"),
        (at("config", "budget", value={"seconds": "1"}), "trace.config.budget['seconds'] must be a number, got '1'"),
        (at("grammar", "start", value=["LOOK"]), "trace.grammar must be a grammar: start must name stages of ['SUM"),
        (at("usage", value={}), "trace.usage.prompt_tokens must be an integer, but it is missing"),
        (at("answer", value=99), "trace.answer must name nodes of the trace, got 99"),
        (at("answers", value=[99]), "trace.answers must name nodes of the trace, got 99"),
        (at("answer", value=None), "trace.answers must be empty if trace.answer is null, and only then, got [2"),
        (at("answers", value=[]), "trace.answers must be empty if trace.answer is null, and only then, got []"),
        (at("error", value={"type": "E", "message": ""}), "trace.answer must be null if trace.error is not, got 2"),
        (at("error", value="E"), "trace.error must be an object or null, got 'E'"),
    ],
)
def test_what_is_no_trace_says_where(data, message):
    with pytest.raises(ValueError) as raised:
        parse_trace(data)
    assert message in str(raised.value)


def test_files_of_one_and_of_many(tmp_path):
    one, many = tmp_path / "a.JSON", tmp_path / "b.jsonl"
    trace = two_retraces()
    one.write_text(trace.to_json(indent=1))
    data = json.loads(spent().to_json())
    lines = [{"trace": data, "gold": 7, "image": "7.png", "id": "x"}, data, {"trace": data, "gold": None}]
    many.write_text("\n\n".join(map(json.dumps, lines)))
    assert read_trace(one) == Record(trace, "a.JSON")
    assert [holds_many(path) for path in (one, many, tmp_path)] == [False, True, True]
    records = [*read_traces(many)]
    assert records[0] == Record(records[1].trace, "b.jsonl, line 1", "7.png", "7", "x")
    assert [record.source for record in records] == [f"b.jsonl, line {n}" for n in (1, 3, 5)]
    assert [record.source for record in read_traces(tmp_path)] == ["a.JSON", *(r.source for r in records)]


@pytest.mark.parametrize(
    "line, detail",
    [
        ("{", "not JSON, column 2: Expecting property name"),
        ("1", "trace must be an object, got int"),
        ("[" * 100_000, "not JSON that can be read: it is nested too deeply"),
        (b"\xff", "not JSON: 'utf-8' codec can't decode byte"),
        ('{"version": 1}', "trace.version must be 7, got 1"),
        ('{"trace": {}, "golf": "4"}', "fields must be trace, image, gold, id, got 'golf'"),
        ('{"trace": {}, "gold": [4]}', "gold must be a string or a number, got list"),
        ('{"trace": {}, "image": 4}', "image must be a string, got int"),
    ],
)
def test_an_error_names_the_file_the_line_and_the_field(tmp_path, line, detail):
    file, good = tmp_path / "a.jsonl", spent().to_json().encode()
    file.write_bytes(b"\n".join([good, line if isinstance(line, bytes) else line.encode(), good]))
    first, error, last = scan_traces(file)
    assert isinstance(first, Record) and isinstance(last, Record) and isinstance(error, TraceError)
    assert str(error).startswith(f"a.jsonl, line 2: {detail}") and error.detail.startswith(detail)
    with pytest.raises(TraceError, match=r"^a\.jsonl, line 2: "):
        [*read_traces(file)]


def test_one_file_that_can_not_be_read(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_trace(tmp_path / "none.json")
    with pytest.raises(FileNotFoundError):
        [*scan_traces(tmp_path / "none.jsonl")]
    (tmp_path / "a.json").mkdir()
    (tmp_path / "b.json").write_text("{}\n{}")
    folder, file = scan_traces(tmp_path)
    assert folder.source == "a.json" and "directory" in folder.detail
    assert str(file) == "b.json: not JSON, line 2, column 1: Extra data"


def test_what_a_search_asks_of_its_trace():
    trace = two_retraces()
    ids = [node["id"] for node in trace.path(trace.data["answer"])]
    assert [trace.nodes[id]["stage"] for id in ids] == ["SUMMARY", "CAPTION", "REASONING", "CONCLUSION"]
    assert trace.text(ids[1]) == trace.nodes[ids[0]]["text"] + trace.nodes[ids[1]]["text"]
    assert trace.path(0) == trace.path(None) == [] and trace.text(None) == ""
    assert [event["to"] for event in trace.events("retraced")] == ["CAPTION", "CAPTION"]
    assert {event["event"] for event in trace.events("kept", "accepted")} == {"kept", "accepted"}
    assert trace.drawn_after_budget == frozenset() and spent().drawn_after_budget == {13}


def test_a_failed_search_says_why_and_has_no_answer():
    trace = failed()
    assert trace.data["answer"] is None and trace.data["answers"] == [] and trace.data["nodes"]
    assert trace.data["error"]["type"] == "RuntimeError"
    first, last = trace.data["error"]["message"].splitlines()[0], trace.data["error"]["message"].splitlines()[-1]
    assert first == "out of" and last.startswith("the scorer raised for every candidate")
    assert trace.failure.startswith("RuntimeError: out of memory ") and two_retraces().failure is None


def test_a_search_without_an_answer_and_an_error_was_still_running():
    parts = dict(model="m", versions={}, question="?", search="mine", config={}, grammar=LLAVA_COT, seed=0, bos="one")
    parts |= dict(calibration=None, prompt_tokens=1, nodes=[], events=[], usage=Usage())
    trace = parse_trace(trace_data(**parts, answers=[]))
    assert trace.is_running and trace.failure is None and trace.data["answers"] == []
    assert parse_trace(trace.to_json()) == trace
    failed = parse_trace(trace_data(**parts, answers=[5], error=KeyError("x")))
    assert failed.failure == "KeyError: 'x'" and not failed.is_running and not two_retraces().is_running


def test_it_needs_neither_torch_nor_numpy():
    code = (
        "import sys, llava_cot.trace, llava_cot.report.many; "
        "assert not {'torch', 'transformers', 'numpy', 'PIL'} & set(sys.modules), sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
