"""``llava-cot annotate`` against a real server with scripted faults: every id ends in exactly one record."""

import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from pathlib import Path

import pytest
from helpers import chat_server
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from llava_cot import cli
from llava_cot.data.annotation import annotate_file, estimate_file
from llava_cot.data.annotation.check import tidy, violation
from llava_cot.data.annotation.client import Reply
from llava_cot.data.annotation.cost import Prices
from llava_cot.data.annotation.judge import read_verdict
from llava_cot.data.annotation.past import ANNOTATION
from llava_cot.data.conversations import parse_conversation
from llava_cot.journal import Journal, read_journal
from llava_cot.stages import LLAVA_COT, STAGES, render


class Served:
    """The server as a process."""

    def __init__(self, port):
        self.url = f"http://127.0.0.1:{port}/v1"

    def state(self):
        with urllib.request.urlopen(self.url) as reply:
            return json.load(reply)

    def log(self, question=None):
        return [entry for entry in self.state()["log"] if question in (None, entry["question"])]


@pytest.fixture
def serve(tmp_path):
    """Start a server whose replies take so many seconds."""
    started = []

    def start(delay=0.0):
        port = tmp_path / f"port{len(started)}"
        started.append(subprocess.Popen([sys.executable, chat_server.__file__, str(port), str(delay)]))
        while not port.exists():
            assert started[-1].poll() is None
            time.sleep(0.01)
        return Served(port.read_text())

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")


@pytest.fixture
def make(tmp_path):
    """Write a file of questions about one image; ids are a, b, ... if they are texts, else the rows as they are."""
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")

    def write(*questions):
        rows = [
            q if isinstance(q, dict) else {"id": f"q{at}", "image": "red.png", "question": q, "answer": "4"}
            for at, q in enumerate(questions)
        ]
        file = tmp_path / "questions.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return file

    return write


def annotate(questions, served, **options):
    out = questions.with_name("out.jsonl")
    options = {"model": "m", "base_url": served.url, "timeout": 20.0, "max_retries": 2, **options}
    outcome = annotate_file(questions, out, **options)
    return outcome, rows(out), {row["id"]: row for row in rows(out.with_suffix(".rejects.jsonl"))}


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def check_accepted(record):
    for turn in parse_conversation(record).turns:
        assert LLAVA_COT.violation(turn.answer) is None and violation(turn.answer) is None
    provenance = record["provenance"]
    assert re.fullmatch("[0-9a-f]{64}", provenance["content_key"])
    assert provenance["model"] == "m" and provenance["reported_model"] == "served" and provenance["prompt_version"]
    assert all(verdict["is_valid"] for verdict in provenance["verdicts"])
    assert len(provenance["verdicts"]) == len(provenance["attempts"]) == len(record["conversations"]) // 2


PASSING = ["500", "503", "reset", "malformed", "no choices", "null message", "html"]


def test_each_fault_ends_in_one_record(serve, make, monkeypatch):
    """What passes is asked again; what does not is a reject with its reason, and is not asked in the next run."""
    monkeypatch.setattr("llava_cot.endpoint.FIRST_WAIT", 0.05)
    passing = [f"[fault {name}]" for name in [*PASSING, "429", *chat_server.REPLIES]]
    lasting = {
        "[always 500]": ("error", "HTTP 500: .*scripted 500.*, 3 tries"),
        "[always 418]": ("error", "HTTP 418: .*scripted 418"),
        "[always 400]": ("error", "HTTP 400: .*scripted 400"),
        "[always reset]": ("error", "no connection: .*, 3 tries"),
        "[always malformed]": ("error", "the reply is not a chat completion: .*, 3 tries"),
        "[always refusal]": ("refusal", "I can't help with that."),
        "[always no tags]": ("violation", "first comes SUMMARY, got the end"),
        "[always outside]": ("violation", "there is text outside the four sections"),
        "[always empty stage]": ("violation", "SUMMARY is empty"),
        "[always special]": ("violation", r"the text has the special token <\|image\|>"),
        "[always leak]": ("violation", "the text tells that an answer was given: 'reference answer'"),
        "[wrong] [judge invalid]": ("judge", "another number"),
    }
    questions, served = make(*passing, *lasting), serve()
    outcome, accepted, rejected = annotate(questions, served, concurrency=32, prices=Prices(2, 8))
    ids = [f"q{at}" for at in range(len(passing) + len(lasting))]
    assert sorted([row["id"] for row in accepted]) == sorted(ids[: len(passing)])
    assert [*map(len, (accepted, rejected))] == [outcome.accepted, sum(outcome.rejected.values())]
    for record in accepted:
        check_accepted(record)
    for name, (kind, reason) in zip(ids[len(passing) :], lasting.values()):
        assert rejected[name]["kind"] == kind and re.fullmatch(reason, rejected[name]["reason"], re.DOTALL), name
    asked = Counter(entry["question"] for entry in served.log())
    assert asked["[always refusal]"] == asked["[always 418]"] == asked["[always 400]"] == 1
    assert asked["[always no tags]"] == 2 and asked["[always 500]"] == 3 and asked["[fault leak]"] == 2
    first, second = (entry["time"] for entry in served.log("[fault 429]"))
    assert second - first >= 0.7  # its Retry-After

    usage = served.state()["usage"]
    assert usage == {name: getattr(outcome.usage, name) for name in usage}
    assert outcome.usage.requests == len(served.log())
    assert outcome.cost == pytest.approx((2 * usage["prompt_tokens"] + 8 * usage["completion_tokens"]) / 1e6)
    recorded = Counter()
    for record in [*accepted, *rejected.values()]:
        recorded.update(record["provenance"]["usage"])
    assert recorded == {**usage, "requests": len(served.log())}

    again, *_ = annotate(questions, served)
    assert again.total == again.done == again.usage.requests == 0
    retried, *_, rejected = annotate(questions, served, retry_rejects=True, limit=2)
    assert retried.total == 2 and len(rows(questions.with_name("out.rejects.jsonl"))) == len(rejected) == len(lasting)
    assert rejected["q13"]["provenance"]["usage"]["requests"] == 6  # those of both runs


def test_a_request_has_its_time_as_a_whole(serve, make):
    """Also one whose bytes drip in one by one, each before the time is up."""
    _, accepted, _ = annotate(make("[fault hang]", "[fault drip]"), serve(), timeout=4.0)
    assert sorted(row["id"] for row in accepted) == ["q0", "q1"]


def test_a_request_that_never_has_a_reply_is_a_reject(serve, make):
    *_, rejected = annotate(make("[always hang]"), serve(), timeout=0.3)
    assert (rejected["q0"]["kind"], rejected["q0"]["reason"]) == ("error", "no reply within 0.3 s, 3 tries")


@pytest.mark.parametrize("name", [name for name in chat_server.VERDICTS])
def test_only_a_clear_valid_is_valid(name):
    content = chat_server.VERDICTS[name]
    reply = Reply(content or "", "" if content is not None else "no", False, "m")
    assert read_verdict(reply).is_valid == (name in ("valid", "fenced"))
    assert not read_verdict(Reply(content or "", "", True, "m")).is_valid
    assert name in ("valid", "fenced") or read_verdict(reply).reason


def test_the_judge_is_asked_by_text_alone_and_for_json(serve, make):
    """An exact match asks nobody; an endpoint without structured output is asked for the same as text, from then on."""
    questions = make(
        "How many? [wrong] [judge valid]", *(f"{n} [no schema] [wrong] [judge fenced]" for n in "abc"), "?"
    )
    served = serve()
    outcome, accepted, _ = annotate(questions, served, concurrency=1)
    assert outcome.accepted == len(accepted) == 5
    verdicts = {record["id"]: record["provenance"]["verdicts"][0] for record in accepted}
    assert verdicts["q0"] == {"is_valid": True, "by": "model", "reason": "same"}
    assert verdicts["q4"] == {"is_valid": True, "by": "match", "reason": ""}
    judged = [entry for entry in served.log() if entry["judge"]]
    assert [("response_format" in entry["body"], entry["status"]) for entry in judged] == [
        (True, 200), (True, 400), (False, 200), (False, 200), (False, 200),
    ]  # fmt: skip
    assert "image_url" not in json.dumps(judged)
    assert judged[0]["body"]["response_format"]["json_schema"]["strict"] is True


def test_turns_have_their_history_and_the_image_stands_first(serve, make):
    turns = ["<image>\nHow many?", "4", "And [fault no tags] red ones?", "2"]
    talk = [{"from": ("human", "gpt")[at % 2], "value": text} for at, text in enumerate(turns)]
    files = {"id": 7, "image": ["red.png", "red.png"], "conversations": talk, "hints": "count twice"}
    text = {"id": "text", "question": "1 + 1?", "answer": 2}
    served = serve()
    _, accepted, _ = annotate(make(files, text), served, concurrency=1, temperature=0.5, seed=3)
    record = accepted[0]
    check_accepted(record)
    assert record["id"] == 7 and record["image"] == ["red.png", "red.png"] and "image" not in accepted[1]
    assert record["conversations"][0] == {"from": "human", "value": "How many?"} and record["provenance"][
        "attempts"
    ] == [1, 2]
    first, second, third, _ = (entry["body"] for entry in served.log())
    assert [message["role"] for message in second["messages"]] == ["user", "assistant", "user"]
    assert [part["type"] for part in second["messages"][0]["content"]] == ["image_url", "image_url", "text"]
    assert second["messages"][0]["content"][2]["text"] == "How many?"
    assert second["messages"][1]["content"] == record["conversations"][1]["value"]
    assert "count twice" in json.dumps(first) and "count twice" not in json.dumps(second)
    assert (first["temperature"], first["seed"], third["seed"]) == (0.5, 3, 4)
    assert [entry["key"] for entry in served.log()] == ["Bearer sk-test"] * 4


def test_starts_are_spaced(serve, make):
    """600 requests a minute are one each 0.1 s, whatever the concurrency; tokens likewise."""
    served = serve()
    annotate(make(*map(str, range(8))), served, concurrency=8, rpm=600)
    times = [entry["time"] for entry in served.log()]
    assert times[-1] - times[0] >= 0.6  # 0.7 less what the first may be late
    served, questions = serve(), make(*map(str, range(8)))
    questions.with_name("out.jsonl").unlink()
    outcome, *_ = annotate(questions, served, concurrency=1, tpm=60_000, image_tokens=0)
    times = [entry["time"] for entry in served.log()]
    told = outcome.usage.prompt_tokens + outcome.usage.completion_tokens
    assert times[-1] - times[0] >= 0.8 * told * 7 / 8 / 1000


def test_a_dry_run_sends_and_writes_nothing(serve, make):
    questions, served = make(*["?"] * 10), serve()
    before = sorted(questions.parent.iterdir())
    out, options = questions.with_name("out.jsonl"), {"model": "m", "prices": Prices(1, 10), "limit": 5}
    estimate = estimate_file(questions, out, **options)
    assert (estimate.records, estimate.turns, estimate.usage.requests, estimate.measured) == (5, 5, 10, 0)
    assert estimate.usage.prompt_tokens > 5 * 1000 and estimate.usage.completion_tokens >= 5 * 400
    assert estimate.cost == pytest.approx((estimate.usage.prompt_tokens + 10 * estimate.usage.completion_tokens) / 1e6)
    assert sorted(questions.parent.iterdir()) == before and served.log() == []
    outcome, *_ = annotate(questions, served, limit=5)
    measured = estimate_file(questions, out, **options)
    assert (measured.measured, measured.records, measured.usage) == (5, 5, outcome.usage)


def test_it_stops_before_the_money_is_spent(serve, make):
    questions, served = make(*["?"] * 20), serve()
    one, *_ = annotate(questions, served, limit=1, prices=Prices(100, 100))
    outcome, accepted, _ = annotate(questions, served, prices=Prices(100, 100), max_cost=one.cost * 6.5)
    usage = served.state()["usage"]
    assert 0.0001 * sum(usage.values()) <= one.cost * 6.5 and 4 <= len(accepted) <= 6
    assert outcome.stopped.startswith("max_cost=") and outcome.done == len(accepted) - 1
    again, *_ = annotate(questions, served, prices=Prices(100, 100), max_cost=one.cost * 6.5)
    assert again.done <= 1 and served.state()["usage"]["prompt_tokens"] <= one.usage.prompt_tokens * 6.5


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refused_key_stops_with_one_error_and_loses_nothing(serve, make, status):
    questions, served = make("1", "2", f"[always {status}]", "3"), serve()
    with pytest.raises(ValueError, match=f"refuses the key, the model or the account: HTTP {status}"):
        annotate(questions, served, concurrency=1)
    out = questions.with_name("out.jsonl")
    assert [row["id"] for row in rows(out)] == ["q0", "q1"] and rows(questions.with_name("out.rejects.jsonl")) == []


def test_an_image_that_is_not_there_is_a_reject_until_it_is(serve, make):
    missing = {"id": "m", "image": "late.png", "question": "?", "answer": "4"}
    torn = {"id": "t", "image": "torn.png", "question": "?", "answer": "4"}
    questions, served = make(missing, torn, "?"), serve()
    folder = questions.parent
    Image.effect_noise((64, 64), 50).save(folder / "torn.png")
    (folder / "torn.png").write_bytes((folder / "torn.png").read_bytes()[:1000])
    _, accepted, rejected = annotate(questions, served)
    assert [row["id"] for row in accepted] == ["q2"] and {row["kind"] for row in rejected.values()} == {"image"}
    assert "late.png" in rejected["m"]["reason"] and len(served.log()) == 1
    Image.new("CMYK", (8, 8)).save(folder / "late.png", "TIFF")  # sent as PNG
    _, accepted, rejected = annotate(questions, served)
    assert sorted(row["id"] for row in accepted) == ["m", "q2"] and list(rejected) == ["t"]
    assert "data:image/png;base64," in json.dumps(served.log()[-1])


BAD = [
    ("{", "row 2 of '.*': "),
    ("[]", "row 2 of '.*': row must be an object, got list"),
    ('{"id": "x", "image": "red.png", "question": "?"}', "row 2 .*: answer must be a non-empty string, got None"),
    ('{"id": "x", "image": 3, "question": "?", "answer": "4"}', "row 2 .*: image must be a path"),
    (
        '{"id": "q0", "image": "red.png", "question": "?", "answer": "4"}',
        "row 2 .*: id must be unique, got 'q0' again",
    ),
    ('{"id": "x", "image": "red.png", "conversations": []}', "row 2 .*: conversations must be"),
    ('{"id": "x", "question": "<image>", "answer": "4"}', "row 2 .*: question must have text beside <image>"),
    ('{"id": "x", "question": "?", "answer": "4", "hints": 1}', "row 2 .*: hints must be a string, got 1"),
]


@pytest.mark.parametrize("line, message", BAD)
def test_bad_questions_are_an_error_before_anything_is_asked(make, line, message):
    questions = make("?")
    questions.write_text(questions.read_text() + line + "\n")
    with pytest.raises(ValueError, match=message):
        annotate_file(questions, questions.with_name("out.jsonl"), model="m", base_url="http://127.0.0.1:9")
    assert not questions.with_name("out.jsonl").exists()


def test_bad_settings(make, monkeypatch):
    questions = make("?")
    out = questions.with_name("out.jsonl")
    for options, message in [
        ({"concurrency": 0}, "concurrency must be >= 1, got 0"),
        ({"rpm": 0}, "rpm must be > 0, got 0"),
        ({"timeout": float("nan")}, "timeout must be > 0, got nan"),
        ({"max_cost": 1.0}, "max_cost needs price_in and price_out"),
    ]:
        with pytest.raises(ValueError, match=message):
            annotate_file(questions, out, model="m", **options)
    with pytest.raises(ValueError, match="price_in must be >= 0, got -1"):
        Prices(-1, 1)
    with pytest.raises(ValueError, match="must be three files"):
        annotate_file(questions, questions, model="m")
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(ValueError, match="OPENAI_API_KEY must be set"):
        annotate_file(questions, out, model="m")
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    out.write_text('{"id": "theirs", "question": "?"}\n')
    with pytest.raises(ValueError, match=r"line 1 of '.*' must be a record of annotate"):
        annotate_file(questions, out, model="m")
    assert out.read_text() == '{"id": "theirs", "question": "?"}\n'


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=4), st.data())
def test_a_journal_cut_anywhere_holds_the_whole_records(tmp_path_factory, texts, data):
    path = tmp_path_factory.mktemp("journal") / "out.jsonl"
    journal, ends = Journal(path, ANNOTATION), [0]
    records = [{"id": str(at), "text": text, "provenance": {}} for at, text in enumerate(texts)]
    for record in records:
        journal.append(record)
        ends.append(path.stat().st_size)
    with pytest.raises(ValueError, match="must be written by one process"):
        Journal(path, ANNOTATION)
    journal.close()
    cut = data.draw(st.integers(0, ends[-1]))
    os.truncate(path, cut)
    whole = sum(end <= cut for end in ends) - 1
    assert list(read_journal(path, ANNOTATION)) == records[:whole]
    journal = Journal(path, ANNOTATION)
    assert path.stat().st_size == ends[whole]
    journal.append({"id": "new", "provenance": {}})
    journal.close()
    assert [record["id"] for record in read_journal(path, ANNOTATION)] == [*map(str, range(whole)), "new"]


SECTION = st.text(st.characters(exclude_characters="<>", exclude_categories=["Cs"])).filter(str.strip)


@given(st.lists(SECTION, min_size=4, max_size=4), st.data())
def test_a_text_passes_only_as_four_sections(sections, data):
    text = render(dict(zip(STAGES, sections)))
    if "answer" not in text:
        assert violation(text) is None and tidy(tidy(text)) == tidy(text) and violation(tidy(text)) is None
    drop = data.draw(st.sampled_from([tag for stage in STAGES for tag in (stage.open_tag, stage.close_tag)]))
    assert violation(text.replace(drop, "")) is not None
    assert violation(text + " x") is not None and violation(text + text) is not None


FORK = multiprocessing.get_context("fork")  # starting an interpreter that imports torch takes seconds each


def command(arguments, log):
    """``llava-cot annotate`` in a process of its own, its output in a file."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    sys.stdout = sys.stderr = os.fdopen(file, "w", buffering=1)
    os.environ["OPENAI_API_KEY"] = "sk-test"
    sys.argv = ["llava-cot", "annotate", *arguments]
    cli.main()


def arguments(questions, served, *more):
    return [str(questions), str(questions.with_name("out.jsonl")), "--model", "m", "--base-url", served.url, *more]


def run_killed(given, log, number, is_time):
    """Run the command until it ends or it is time; returns its exit status."""
    process = FORK.Process(target=command_until, args=(given, log, number, is_time))
    process.start()
    process.join()
    return process.exitcode


def command_until(given, log, number, is_time):
    """A thread of the process itself watches: on a busy machine another process could be too late."""

    def watch():
        while not is_time():
            time.sleep(0.005)
        os.kill(os.getpid(), number)

    threading.Thread(target=watch, daemon=True).start()
    command(given, log)


def lines(path: Path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_kill_9_at_random_moments_leaves_one_record_an_id(serve, make):
    kinds = ["{}", "{} [always refusal]", "{} [wrong] [judge invalid]", "{} [fault 500]", "{} [wrong] [judge valid]"]
    questions, served = make(*(kinds[at % 5].format(at) for at in range(40))), serve(0.02)
    out, rejects, log = (questions.with_name(name) for name in ("out.jsonl", "out.rejects.jsonl", "log"))
    given = arguments(questions, served, "--concurrency", "3")
    draw, killed = random.Random(0), 0
    while lines(out) + lines(rejects) < 30:
        done, wait = lines(out) + lines(rejects), draw.uniform(0, 0.1)
        aim, moment = done + draw.randint(2, 9), []

        def is_time(aim=aim, wait=wait, moment=moment):
            if lines(out) + lines(rejects) >= aim:
                moment.append(time.monotonic())
            return moment and time.monotonic() - moment[0] >= wait

        killed += run_killed(given, log, signal.SIGKILL, is_time) == -signal.SIGKILL
        if draw.random() < 0.5:  # what a kill between two parts of a write would leave
            with out.open("a") as file:
                file.write('{"id": "q1", "ima')
    assert killed >= 3
    assert run_killed(given, log, signal.SIGKILL, lambda: False) == 0, log.read_text()
    accepted, rejected = rows(out), rows(rejects)
    assert sorted(row["id"] for row in [*accepted, *rejected]) == sorted(f"q{at}" for at in range(40))
    assert {row["kind"] for row in rejected} == {"refusal", "judge"} and len(rejected) == 16
    for record in accepted:
        check_accepted(record)
    assert len({entry["question"] for entry in served.log()}) == 40


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_what_is_in_flight_end(serve, make, number):
    questions, served = make(*map(str, range(50))), serve(0.1)
    out, log = questions.with_name("out.jsonl"), questions.with_name("log")
    prices = ("--price-in", "1", "--price-out", "2")
    given = arguments(questions, served, "--concurrency", "4", *prices)
    assert run_killed(given, log, number, lambda: lines(out) >= 5) == 128 + number
    text = log.read_text()
    assert f"stopped by {number.name}; {50 - lines(out)} left" in text and "Traceback" not in text
    assert len(rows(out)) == len(served.log()) >= 5  # nothing that was paid for is lost
    assert "requests/s" in text and "$0." in text


def test_errors_and_the_dry_run_of_the_command(make, tmp_path):
    questions, log = make("?"), tmp_path / "log"
    served = Served(9)
    assert run_killed(arguments(questions, served, "--dry-run"), log, 9, lambda: False) == 0
    assert log.read_text().startswith("1 records, 1 turns to annotate: about 2 requests, ")
    assert run_killed(arguments(questions, served, "--price-in", "1"), log, 9, lambda: False) == 2
    assert log.read_text().splitlines()[-1].startswith("error: price_in and price_out must be given together")
