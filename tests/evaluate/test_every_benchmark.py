"""One command a benchmark: its file in each layout is read, asked, scored, summarised and reported."""

import json
import sys

import pytest
from helpers import benchmark_files as files

from llava_cot import cli
from llava_cot.evaluate.benchmarks import BENCHMARKS

LAYOUTS = {
    ("mmstar", "tsv"): files.write_mmstar_tsv,
    ("mmstar", "parquet"): files.write_mmstar_parquet,
    ("mmbench", "tsv"): files.write_mmbench_tsv,
    ("mmvet", "tsv"): files.write_mmvet_tsv,
    ("mathvista", "tsv"): files.write_mathvista_tsv,
    ("mathvista", "parquet"): files.write_mathvista_parquet,
    ("ai2d", "tsv"): files.write_ai2d_tsv,
    ("ai2d-unmasked", "parquet"): files.write_ai2d_parquet,
    ("hallusionbench", "tsv"): files.write_hallusion_tsv,
    ("custom", "jsonl"): files.write_custom_jsonl,
}


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command; it must succeed. Returns its stdout."""

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["llava-cot", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        assert ended.value.code == 0, err
        return out

    return command


def test_no_benchmark_is_left_out():
    assert {name.replace("-", "_") for name, _ in LAYOUTS} | {"world"} == set(BENCHMARKS)


@pytest.mark.parametrize("name, suffix", LAYOUTS)
def test_read_ask_score_and_report(name, suffix, tmp_path, run):
    data, out = tmp_path / f"data.{suffix}", tmp_path / "run"
    LAYOUTS[name, suffix](data)
    arguments = ["evaluate", name, "--data", data, "--out", out, "--max-new-tokens", 40, "--limit", 2]
    summary = json.loads(run(*arguments, "--partial", "--traces", "none", "--json"))
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert rows and len({row["id"] for row in rows}) == len(rows)
    assert {"id", "text", "conclusion", "outcome", "correct", "usage"} <= rows[0].keys()
    assert 0 <= summary["bounds"][0] == summary["accuracy"] <= summary["bounds"][1] <= 1
    assert summary["failed"] == 0 and summary == json.loads((out / "summary.json").read_text())
    assert (out / "report.html").is_file()
    again = json.loads(run("score", out, "--json", "--rules", "strict"))
    assert again["protocol"]["rules"] == "strict" and again["n"] == summary["n"]
    assert json.loads(run("score", out, "--json")) == again  # the rules of the run, and not the benchmark's own
    # The same texts from a file get the same verdicts.
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"id": row["id"], "text": row["text"]}) + "\n" for row in rows))
    scored = json.loads(
        run("score", texts, "--benchmark", name, "--data", data, "--rules", "strict", "--partial", "--json")
    )
    assert (scored["n"], scored["correct"]) == (again["n"], again["correct"])


def test_an_image_that_cannot_be_decoded_is_put_aside_and_tried_again(tmp_path, run):
    data, out = tmp_path / "data.jsonl", tmp_path / "run"
    rows = files.write_custom_jsonl(data, rows=3)
    (tmp_path / "broken.png").write_bytes(b"not an image")
    broken = [{**rows[0], "image": "broken.png"}, {**rows[1], "image": "nowhere.png"}, rows[2]]
    files.write_jsonl(data, broken)
    arguments = ["evaluate", "custom", "--data", data, "--out", out, "--max-new-tokens", 20, "--json"]
    summary = json.loads(run(*arguments))
    errors = [json.loads(line)["error"] for line in (out / "results.jsonl").read_text().splitlines()]
    assert summary["failed"] == 2 and summary["n"] == 3 and errors.count(None) == 1
    assert any("row 2" in error and "nowhere.png" in error for error in errors if error)
    assert any("readable image" in error for error in errors if error)
    assert json.loads(run("score", out, "--json"))["failed"] == 2  # scoring asks nothing again
    assert json.loads(run(*arguments))["failed"] == 2


def test_grades_from_elsewhere(tmp_path, run):
    data, out, asked = tmp_path / "data.tsv", tmp_path / "run", tmp_path / "asked.jsonl"
    files.write_mmvet_tsv(data)
    before = json.loads(
        run("evaluate", "mmvet", "--data", data, "--out", out, "--max-new-tokens", 20, "--partial", "--json")
    )
    assert before["ungraded"] == before["n"] and before["bounds"] == [0.0, 1.0]
    assert json.loads(run("judge", out, "--export", asked, "--json"))["ungraded"] == before["n"]
    rows = [json.loads(line) for line in asked.read_text().splitlines()]
    graded = [{**row, "judge": "a person", "grade": 0.1 * (at % 11)} for at, row in enumerate(rows)]
    files.write_jsonl(asked, graded)
    after = json.loads(run("judge", out, "--grades", asked, "--json"))
    assert after["ungraded"] == 0 and "graded by a person" in after["rules"]
    assert after["accuracy"] == pytest.approx(sum(row["grade"] for row in graded) / len(graded))
    assert json.loads(run("score", out, "--json"))["accuracy"] == after["accuracy"]


def test_predictions_for_other_harnesses(tmp_path, run):
    data, out = tmp_path / "data.tsv", tmp_path / "run"
    files.write_mmstar_tsv(data, rows=3)
    run("evaluate", "mmstar", "--data", data, "--out", out, "--max-new-tokens", 20, "--partial")
    assert run("predictions", out, tmp_path / "table.tsv", "--to", "vlmevalkit") == "3 predictions\n"
    assert run("predictions", out, tmp_path / "log.json", "--to", "lmms-eval") == "3 predictions\n"
    assert (tmp_path / "table.tsv").is_file() and (tmp_path / "log.json").is_file()
