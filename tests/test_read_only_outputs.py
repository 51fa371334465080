"""Every command that writes says in one line that it may not write there, and leaves what is there as it was."""

import json
import os
import re
from contextlib import contextmanager

import pytest
from helpers.benchmark_files import write_custom_jsonl, write_mmstar_tsv, write_mmvet_tsv
from helpers.unprivileged import run_unprivileged

from llava_cot.data import shapes
from llava_cot.evaluate.command import Request, evaluate_benchmark


@contextmanager
def read_only(*paths):
    for path in paths:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        yield
    finally:
        for path in paths:
            path.chmod(0o755 if path.is_dir() else 0o644)


def contents(folder):
    return {path: path.is_file() and path.read_bytes() for path in sorted(folder.rglob("*"))}


def refused(commands, messages):
    """Each command must end with 2 and one line, which is the message. A refusal of typer has a box around it."""
    for arguments, message, (status, said) in zip(commands, messages, run_unprivileged(commands), strict=True):
        assert status == 2 and "Traceback" not in said, f"{arguments}: {said}"
        if message is not None:
            errors = [line for line in said.splitlines() if line.startswith("error:")]
            assert errors == said.splitlines()[-1:] and re.fullmatch(f"error: {message}", errors[0]), said


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Runs, and a folder that may not be written."""
    root = tmp_path_factory.mktemp("outputs")
    evaluate_benchmark(Request(benchmark="world", out=root / "run", limit=2, max_new_tokens=60, traces="all"))
    write_mmvet_tsv(root / "MMVet.tsv", rows=2)
    write_mmstar_tsv(root / "MMStar.tsv", rows=2)
    for name, file in (("mmvet", "MMVet.tsv"), ("mmstar", "MMStar.tsv")):
        request = Request(benchmark=name, data=root / file, out=root / name, max_new_tokens=9, partial=True)
        evaluate_benchmark(request)
    shapes.sample(800_000).image.save(root / "image.png")
    row = {"id": "1", "image": "image.png", "question": "What?", "answer": "a fox"}
    (root / "questions.jsonl").write_text(json.dumps(row) + "\n")
    write_custom_jsonl(root / "rows.jsonl", rows=2)
    (root / "shut").mkdir()
    return root


def test_no_command_writes_to_a_folder_that_it_may_not_write(folders, monkeypatch):
    monkeypatch.chdir(folders)
    asked = ("--limit", "2", "--max-new-tokens", "60")
    a_folder = r"must be a folder that may be written, got '{}'"
    a_file = r"must be a file that may be written, got '{}'"
    cases = (
        (("evaluate", "world", "--out", "shut", *asked), f"out {a_folder}", "shut"),
        (("evaluate", "world", "--out", "shut/new", *asked), f"out {a_folder}", "shut/new"),
        (("evaluate", "world", "--out", "shut/much/deeper", *asked), f"out {a_folder}", "shut/much/deeper"),
        (("evaluate", "world", "--out", "run", *asked), f"out {a_folder}", "run"),
        (("score", "run"), f"answers {a_folder}", "run"),
        (("judge", "mmvet", "--export", "shut/x.jsonl"), f"export {a_file}", "shut/x.jsonl"),
        (("predictions", "mmstar", "shut/x.tsv", "--to", "vlmevalkit"), f"out {a_file}", "shut/x.tsv"),
        (("predictions", "mmstar", "shut/new/x.tsv", "--to", "vlmevalkit"), f"out {a_folder}", "shut/new"),
        (("predictions", "mmstar", "shut/x.json", "--to", "lmms-eval"), f"out {a_file}", "shut/x.json"),
        (("compare", "run", "run", "--html", "shut/x.html"), f"html {a_file}", "shut/x.html"),
        (("tables", "run", "--html", "shut/x.html"), f"html {a_file}", "shut/x.html"),
        (("report", "run/traces", "--html", "shut"), f"html {a_folder}", "shut"),
        (("report", "run/traces", "--html", "shut/new"), f"html {a_folder}", "shut/new"),
        (("report", "run/traces/shapes-800000.json", "--html", "shut/x.html"), f"html {a_file}", "shut/x.html"),
        (("export", "run/traces", "shut/x.jsonl", "--format", "sft"), f"out {a_file}", "shut/x.jsonl"),
        (("annotate", "questions.jsonl", "shut/x.jsonl", "--model", "m"), f"out {a_file}", "shut/x.jsonl"),
    )
    before = contents(folders)
    with read_only(folders / "shut", folders / "run"):
        refused([case[0] for case in cases], [message.format(re.escape(got)) for _, message, got in cases])
    assert contents(folders) == before


def test_a_run_of_which_only_a_part_may_be_written(folders, monkeypatch):
    monkeypatch.chdir(folders)
    commands = [["evaluate", "world", "--out", "run", "--limit", "4", "--max-new-tokens", "60"], ["score", "run"]]
    before = contents(folders)
    with read_only(folders / "run" / "results.jsonl"):
        file = r"must be a file that may be written, got 'run/results\.jsonl'"
        refused(commands, [f"out {file}", f"answers {file}"])
    with read_only(folders / "run" / "traces"):
        refused(commands[:1], [r"out must be a folder that may be written, got 'run/traces'"])
    assert contents(folders) == before


def test_a_folder_that_can_not_even_be_searched(folders, monkeypatch):
    monkeypatch.chdir(folders)
    (folders / "hidden").mkdir()
    os.chmod(folders / "hidden", 0)
    try:
        refused(
            [["evaluate", "world", "--out", f"hidden{end}", "--limit", "2"] for end in ("/new", "")],
            [r"out must be a folder that may be written, got 'hidden/new'", None],
        )
    finally:
        os.chmod(folders / "hidden", 0o755)
    assert not [*(folders / "hidden").iterdir()]
