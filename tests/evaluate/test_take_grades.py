"""``llava-cot judge --grades`` gives a run on MMVet the grades of a judge."""

import json

import pytest
from helpers.benchmark_files import write_mmvet_tsv

from llava_cot.evaluate.benchmarks import open_benchmark
from llava_cot.evaluate.command import judge_answers, score_answers
from llava_cot.evaluate.folder import read_run
from llava_cot.evaluate.judge import export_for_judging, take_grades
from llava_cot.evaluate.result import Result


@pytest.fixture
def run(tmp_path):
    """The folder of a run on six questions, which no judge has graded. The last question has no answer."""
    write_mmvet_tsv(tmp_path / "MMVet.tsv")
    benchmark = open_benchmark("mmvet", tmp_path / "MMVet.tsv", allow_partial=True)
    protocol = {"benchmark": "mmvet", "dataset": vars(benchmark.dataset), "rules": benchmark.default_rules}
    protocol |= {"limit": None, "repeats": 1}
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps(protocol))
    texts = [f"a sign {at}" for at in range(5)]
    results = [Result(f"v1_{at}", 0, text, text, "complete", None, None, None, "") for at, text in enumerate(texts)]
    results.append(Result.failed("v1_5", 0, "no image", 1))
    (folder / "results.jsonl").write_text("".join(json.dumps(result.to_dict()) + "\n" for result in results))
    return folder


def grade(run, path, numbers):
    """Export what is to be judged, and add a grade to each line but the last ones."""
    benchmark = open_benchmark("mmvet", run.parent / "MMVet.tsv", allow_partial=True)
    export_for_judging(read_run(run).scored(benchmark), path)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    graded = [row | {"grade": number, "judge": "me"} for row, number in zip(rows, numbers)]
    path.write_text("".join(json.dumps(row) + "\n" for row in graded))
    return graded


def score(run, grades=None):
    if grades is None:
        return score_answers(run, None, None, None, "llava-cot", True)
    return judge_answers(run, None, lambda answered, path: take_grades(answered, grades, path))


def test_a_run_gets_the_grades_and_keeps_them(run, tmp_path, capsys):
    before = score(run)
    assert capsys.readouterr().err == "", "a run whose answers failed is finished"
    assert (before["ungraded"], before["failed"]) == (5, 1), "what failed stays in the run"
    grade(run, tmp_path / "grades.jsonl", [1.0, 0.5, 0.0, 0.2])
    summary = score(run, tmp_path / "grades.jsonl")
    assert summary["accuracy"] == pytest.approx(1.7 / 6)
    assert (summary["ungraded"], summary["failed"], summary["rules"]["graded by me"]) == (1, 1, 4)
    assert score(run) == summary, "grades outlive a score without any"
    grade(run, tmp_path / "other.jsonl", [0.1])
    assert score(run, tmp_path / "other.jsonl")["accuracy"] == pytest.approx(0.8 / 6)


def test_grades_of_another_answer_are_refused_and_change_nothing(run, tmp_path):
    rows = grade(run, tmp_path / "grades.jsonl", [1.0])
    (tmp_path / "grades.jsonl").write_text(json.dumps(rows[0] | {"prediction": "a cat"}) + "\n")
    before = (run / "results.jsonl").read_text()
    with pytest.raises(ValueError, match="'a cat' for question 'v1_0', repeat 0; the answer is 'a sign 0'"):
        score(run, tmp_path / "grades.jsonl")
    assert (run / "results.jsonl").read_text() == before


def test_a_run_that_has_not_ended_is_not_graded(run, tmp_path):
    grade(run, tmp_path / "grades.jsonl", [1.0])
    lines = (run / "results.jsonl").read_text().splitlines(keepends=True)
    (run / "results.jsonl").write_text("".join(lines[:4]))
    with pytest.raises(ValueError, match="must be a run that has ended, got 4 of 6 results"):
        score(run, tmp_path / "grades.jsonl")
    assert not (run / "grades.jsonl").exists()
