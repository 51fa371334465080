"""Runs of a benchmark: what is written, what a run that was interrupted goes on with, and what is refused."""

import fcntl
import json
import os
import random
import resource
import shutil
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from helpers.benchmark_files import write_mmbench_tsv, write_mmstar_tsv
from helpers.ranks import CONTEXT

from llava_cot import SwiresGenerator, cli
from llava_cot.data import shapes
from llava_cot.data.export import export_file
from llava_cot.evaluate.command import Request, evaluate_benchmark, score_answers
from llava_cot.evaluate.folder import RESULT, trace_stem
from llava_cot.evaluate.manifest import seed_of, source_commit
from llava_cot.evaluate.run import RunFolder
from llava_cot.journal import Journal

KILLS = int(os.environ.get("LLAVA_COT_KILLS", 2))  # set both to kill more often, or two actors: ray:2
WORKERS = os.environ.get("LLAVA_COT_WORKERS", "local")


def request(out, **changes):
    given = dict(benchmark="world", out=out, search="greedy", limit=4, max_new_tokens=120, in_flight=3)
    return Request(**{**given, **changes})


def lines(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def answers(folder):
    """All that a run says of each question, without times."""
    rows = {}
    for row in lines(folder):
        assert (row["id"], row["repeat"]) not in rows
        usage = {key: value for key, value in row["usage"].items() if key not in ("seconds", "steps")}
        rows[row["id"], row["repeat"]] = {**row, "usage": usage}
    return rows


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An undisturbed run of six questions, each asked twice."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    evaluate_benchmark(request(out, search="sample", settings={"temperature": 1.0}, limit=6, repeats=2, traces="all"))
    return out


def test_what_a_run_writes(whole):
    rows, tiny = answers(whole), SwiresGenerator.from_pretrained("tiny")
    assert len(rows) == 12
    for (name, repeat), row in rows.items():
        sample = shapes.sample(int(name.removeprefix("shapes-")))
        seed = seed_of(0, name, repeat)
        settings = {"temperature": 1.0, "max_new_tokens": 120}
        answer = tiny.answer(sample.image, sample.question, "sample", seed=seed, **settings)
        assert row["seed"] == seed and row["text"] == answer.text and row["conclusion"] == answer.conclusion
        assert row["outcome"] == answer.stages["CONCLUSION"].outcome and row["error"] is None
        assert row["correct"] is shapes.is_correct(sample, answer.conclusion)
        assert row["usage"]["generated_tokens"] == answer.usage.generated_tokens
        trace = json.loads((whole / "traces" / f"{trace_stem(name, repeat)}.json").read_text())
        assert trace["trace"]["nodes"][0]["tokens"] == answer.tokens and trace["gold"] == sample.answer
        assert (whole / "traces" / trace["image"]).is_file()
    assert export_file(whole / "traces", whole / "rows.jsonl", "sft") > 0
    summary = json.loads((whole / "summary.json").read_text())
    assert (summary["n"], summary["unparsed"]) == (6, 0)
    assert summary["accuracy"] == pytest.approx(sum(row["correct"] for row in rows.values()) / 12)
    manifest = json.loads((whole / "run.json").read_text())
    assert manifest["versions"]["source_commit"] == source_commit() and manifest["preset"] == "plain"


def test_a_run_goes_on_with_more_questions_and_repeats(whole, tmp_path):
    out = tmp_path / "grown"
    for limit, repeats in ((2, 1), (6, 1), (6, 2), (6, 2)):
        evaluate_benchmark(
            request(out, search="sample", settings={"temperature": 1.0}, limit=limit, repeats=repeats, in_flight=2)
        )
    assert answers(out) == answers(whole)


def test_a_torn_last_line_is_asked_again(whole, tmp_path):
    out = tmp_path / "torn"
    out.mkdir()
    (out / "run.json").write_bytes((whole / "run.json").read_bytes())
    data = (whole / "results.jsonl").read_bytes()
    (out / "results.jsonl").write_bytes(data[: int(len(data) * 0.4)])
    evaluate_benchmark(request(out, search="sample", settings={"temperature": 1.0}, limit=6, repeats=2))
    assert answers(out) == answers(whole)


def test_with_a_smaller_limit_the_rest_is_kept_and_not_counted(whole, tmp_path):
    out = shutil.copytree(whole, tmp_path / "smaller")
    given = dict(search="sample", settings={"temperature": 1.0}, limit=2, repeats=1)
    summary = evaluate_benchmark(request(out, **given))
    assert (summary["n"], summary["results"], summary["repeats"], summary["protocol"]["limit"]) == (2, 2, 1, 2)
    assert answers(out) == answers(whole)


def test_score_needs_all_results_and_keeps_those_that_failed(whole, tmp_path):
    out = shutil.copytree(whole, tmp_path / "failed")
    rows = lines(out)
    rows[3] |= {"text": "", "conclusion": "", "outcome": "failed", "score": None, "correct": None, "error": "lost"}
    (out / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = score_answers(out, None, None, None, "llava-cot", False)
    assert (summary["results"], summary["failed"]) == (12, 1) and lines(out) == rows
    (out / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[1:]))
    with pytest.raises(ValueError, match="must be a run that has ended, got 11 of 12 results"):
        score_answers(out, None, None, None, "llava-cot", False)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({}, "line 2: each id and repeat must stand once, got 'shapes-800000' again"),
        ({"id": "stray"}, "results must be of questions in"),
        ({"id": "\ud83d"}, "results must be of questions in"),
        ({"repeat": "1"}, "line 2: must be a result, got repeat '1'"),
        ({"score": float("nan"), "repeat": 9}, "line 2: must be a result, got score nan"),
        ({"usage": {"seconds": None}}, "line 2: must be a result, got repeat and usage"),
        ({"news": 1}, "line 2: must be a result, got 'news', which this version does not know"),
    ],
)
def test_a_result_that_is_none_of_the_run(whole, tmp_path, changes, message):
    out = shutil.copytree(whole, tmp_path / "stray")
    first = (out / "results.jsonl").read_text().splitlines(keepends=True)[0]
    (out / "results.jsonl").write_text(first + json.dumps(json.loads(first) | changes) + "\n")
    held = {path: path.read_bytes() for path in out.iterdir() if path.is_file()}
    given = dict(search="sample", settings={"temperature": 1.0}, limit=6, repeats=2)
    with pytest.raises(ValueError, match=message.replace("800000", "[0-9]*")):
        evaluate_benchmark(request(out, **given))
    assert {path: path.read_bytes() for path in held} == held


def test_another_protocol_is_refused_with_the_difference(whole):
    before = {path: path.read_bytes() for path in whole.iterdir() if path.is_file()}
    changed = request(whole, search="sample", settings={"temperature": 0.5}, limit=6, repeats=2, seed=1)
    with pytest.raises(ValueError, match=r"(?s)settings.temperature: 1.0 there, 0.5 now.*seed: 0 there, 1 now"):
        evaluate_benchmark(changed)
    assert {path: path.read_bytes() for path in before} == before


def test_two_processes_may_not_write_one_run(whole):
    manifest = json.loads((whole / "run.json").read_text())
    folder = RunFolder(whole, manifest)
    try:
        with pytest.raises(ValueError, match="must be written by one process"):
            RunFolder(whole, manifest)
    finally:
        folder.close()


def command(arguments, messages, file_size):
    """What ``llava-cot`` does, in a process that has imported torch; no file may have more than ``file_size`` bytes."""
    torch.set_num_threads(1)
    os.dup2(messages.fileno(), 2)
    messages.close()
    sys.stderr = os.fdopen(2, "w", closefd=False)
    if file_size:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    sys.argv = ["llava-cot", *arguments]
    cli.main()


def start(out, *arguments, file_size=None):
    """A process of its own, and what it writes to stderr."""
    arguments = ["evaluate", "world", "--out", str(out), "--search", "greedy", "--max-new-tokens", "120", *arguments]
    stderr, end = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=command, args=(arguments, end, file_size))
    process.start()
    end.close()
    return process, open(os.dup(stderr.fileno()))


def finish(process, stderr):
    """The exit status, and all of stderr."""
    with stderr:
        said = stderr.read()
    process.join()
    return process.exitcode, said


def test_a_file_that_was_replaced_while_it_was_opened_is_not_written(tmp_path, monkeypatch):
    path, lock = tmp_path / "results.jsonl", fcntl.flock

    def after_another_process(file, operation):
        (tmp_path / "new").write_text("")
        (tmp_path / "new").replace(path)
        lock(file, operation)

    monkeypatch.setattr(fcntl, "flock", after_another_process)
    with pytest.raises(ValueError, match="must be written by one process"):
        Journal(path, RESULT)


def written(out):
    """How many whole lines the results have."""
    return (out / "results.jsonl").read_bytes().count(b"\n") if (out / "results.jsonl").exists() else 0


def test_killed_at_random_moments(tmp_path):
    """Every id stands once, and every answer is that of a run that was left alone."""
    undisturbed, out, draw = tmp_path / "undisturbed", tmp_path / "killed", random.Random(time.time_ns())
    limit = 8 * KILLS
    arguments = ("--limit", str(limit), "--in-flight", "2", "--workers", WORKERS)
    evaluate_benchmark(request(undisturbed, limit=limit, in_flight=8))
    for _ in range(KILLS):
        (process, stderr), target = start(out, *arguments), written(out) + draw.randrange(1, 8)
        while process.is_alive() and written(out) < target:  # the moment hangs on how far it is, not on the clock
            time.sleep(0.001 * draw.random())
        process.kill()
        finish(process, stderr)
    status, said = finish(*start(out, *arguments))
    assert status == 0, said
    assert answers(out) == answers(undisturbed)


def test_a_full_disk_ends_in_one_line_and_a_clean_resume(tmp_path):
    out = tmp_path / "full"
    status, stderr = finish(*start(out, "--limit", "6", "--traces", "none", file_size=3000))
    assert status == 2 and "error:" in stderr and "Traceback" not in stderr
    held = (out / "results.jsonl").read_bytes()
    assert held.endswith(b"\n") and 0 < len(held) <= 3000
    evaluate_benchmark(request(out, limit=6))
    assert len(answers(out)) == 6


def test_a_data_file_that_is_cut_ends_in_one_line_and_a_clean_resume(tmp_path, monkeypatch, capsys):
    data, out = tmp_path / "data.tsv", tmp_path / "out"
    write_mmstar_tsv(data, rows=6)
    whole = data.read_bytes()
    arguments = ["evaluate", "mmstar", "--data", str(data), "--partial", "--out", str(out), "--max-new-tokens", "20"]
    monkeypatch.setattr(sys, "argv", ["llava-cot", *arguments, "--in-flight", "1"])

    def finished():
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, capsys.readouterr().err

    def cut(result):
        data.write_bytes(whole[: len(whole) // 2])

    with monkeypatch.context() as patched:
        patched.setattr("llava_cot.evaluate.command.shown", lambda *_: nullcontext(cut))
        status, said = finished()
    assert status == 2 and said.splitlines()[-1] == (
        f"error: {data}: it must stay as it is while it is used, and it was changed or cut"
    )
    assert 0 < len(lines(out)) < 6 and all(row["error"] is None for row in lines(out))
    data.write_bytes(whole)
    assert finished()[0] == 0 and len(answers(out)) == 6


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"benchmark": "nothing"}, "benchmark must be one of"),
        ({"data": Path("x.tsv")}, "data must not be given for the world"),
        ({"search": "nothing"}, "search must be one of"),
        ({"settings": {"n": 2}}, "n is not supported by search='greedy'"),
        ({"scorer": "vote"}, "scorer is not supported by search='greedy'"),
        ({"search": "best_of_n", "scorer": "nobody"}, "scorer must be one of"),
        ({"preset": "nothing"}, "preset must be one of"),
        ({"rules": "nothing"}, "rules must be one of"),
        ({"workers": "ray:0"}, "workers must be 'local' or 'ray:N'"),
        ({"grammar": "nothing"}, "grammar must be one of"),
    ],
)
def test_bad_arguments_are_named_before_anything_is_loaded(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        evaluate_benchmark(request(tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_no_run(tmp_path):
    (tmp_path / "results.jsonl").write_text("mine\n")
    with pytest.raises(ValueError, match=r"which has no run\.json"):
        evaluate_benchmark(request(tmp_path))
    with pytest.raises(ValueError, match="out must be a folder"):
        evaluate_benchmark(request(tmp_path / "results.jsonl"))
    with pytest.raises(ValueError, match="out must be a folder"):
        evaluate_benchmark(request(tmp_path / "results.jsonl" / "run"))
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="out must be a folder"):
        evaluate_benchmark(request(tmp_path / "link"))
    assert (tmp_path / "results.jsonl").read_text() == "mine\n"


def test_score_a_run_and_a_file(whole, tmp_path, monkeypatch, capsys):
    before = answers(whole)
    assert score_answers(whole, None, None, None, "llava-cot", False)["n"] == 6
    assert answers(whole) == before
    texts = tmp_path / "texts.jsonl"
    rows = [{"id": name, "text": row["text"]} for (name, repeat), row in before.items() if repeat == 0]
    texts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(sys, "argv", ["llava-cot", "score", str(texts), "--benchmark", "world", "--json"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    summary = json.loads(capsys.readouterr().out)
    assert ended.value.code == 0 and summary["n"] == 6
    assert summary["correct"] == sum(row["correct"] for (_, repeat), row in before.items() if repeat == 0)


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", r'line 1 of .* must be an object with an "id" and a "text"'),
        ('{"id": "shapes-800000"}', 'must be an object with an "id" and a "text"'),
        ('{"id": "nobody", "text": "4"}', "results must be of questions in"),
        ('{"id": "shapes-800000", "text": "4"}\n{"id": "shapes-800000", "text": "4"}', "each id must stand once"),
        ('{"id": "shapes-800000", "text": "4", "repeat": -1}', "repeat must be an integer >= 0"),
    ],
)
def test_bad_texts(tmp_path, text, message):
    path = tmp_path / "texts.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        score_answers(path, "world", None, None, "llava-cot", False)


def test_texts_of_a_part_of_a_group(tmp_path):
    rows = write_mmbench_tsv(tmp_path / "data.tsv")
    texts = [json.dumps({"id": row["index"], "text": row["answer"]}) + "\n" for row in rows]
    (tmp_path / "texts.jsonl").write_text("".join(texts))
    given = tmp_path / "texts.jsonl", "mmbench", tmp_path / "data.tsv", None, "llava-cot", True
    assert score_answers(*given)["accuracy"] == 1
    (tmp_path / "texts.jsonl").write_text("".join(texts[:-1]))
    with pytest.raises(ValueError, match=r"group '.*' of MMBench counts as a whole, and has \d of its \d answers"):
        score_answers(*given)


def test_the_dry_run_prints_the_bound(tmp_path, monkeypatch, capsys):
    arguments = ["evaluate", "world", "--out", str(tmp_path / "out"), "--search", "swires:released", "--dry-run"]
    monkeypatch.setattr(sys, "argv", ["llava-cot", *arguments, "--limit", "10", "--set", "cutoff=0.5"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0 and "at most 440 generations" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_names_that_are_no_text_or_too_long(tmp_path):
    folder = tmp_path / os.fsdecode(b"\xff")
    folder.mkdir()
    rows = [
        {"id": "a\n/😀" * 2_000, "question": "q", "answer": "4", "image": "x.png"},
        {"id": "b", "question": "q", "answer": "4", "image": "x." * 5_000},
    ]
    (folder / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = dict(benchmark="custom", data=folder / "own.jsonl", limit=None)
    summary = evaluate_benchmark(request(tmp_path / "out", **given))
    assert summary["failed"] == 2 and all("there is none at" in row["error"] for row in lines(tmp_path / "out"))
    assert (tmp_path / "out" / "report.html").stat().st_size and (tmp_path / "out" / "report.md").stat().st_size


def test_seeds_and_names():
    seeds = {seed_of(seed, name, repeat) for seed in (0, 1) for name in ("a", "b", "a1") for repeat in (0, 1, 2)}
    assert len(seeds) == 18 and all(0 <= seed < 2**63 for seed in seeds)
    assert trace_stem("a/../b c", 0) == "a%2F..%2Fb%20c" and trace_stem("a", 2) == "a@2"
