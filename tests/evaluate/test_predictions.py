"""Predictions as other harnesses read them, scored by VLMEvalKit's own functions where it is installed."""

import csv
import json
import random

import pytest
from helpers.counting_benchmark import CountingBenchmark, results_of, write_tsv
from helpers.vlmeval_source import vlmeval_functions

from llava_cot.evaluate.export import FAILED, write_lmms_eval_log, write_vlmevalkit_table
from llava_cot.evaluate.result import Result
from llava_cot.evaluate.rules import judge


def read_tsv(path):
    with open(path, encoding="utf-8", newline="") as file:
        return [*csv.DictReader(file, delimiter="\t")]


@pytest.fixture
def counting(tmp_path):
    benchmark = CountingBenchmark(12, tmp_path / "Counting.tsv")
    write_tsv(benchmark, tmp_path / "Counting.tsv")
    return benchmark


def test_the_table_has_each_row_and_no_images(counting, tmp_path):
    out = tmp_path / "outputs" / "llava-cot_Counting.tsv"  # in a folder that does not exist yet
    assert write_vlmevalkit_table(counting, results_of(counting), out) == 12
    rows = read_tsv(out)
    assert list(rows[0]) == ["index", "question", "A", "B", "C", "D", "answer", "category", "prediction"]
    for number, row in enumerate(rows):
        assert row["index"] == str(number) and row["prediction"] == f"answer {number}"
        assert row["question"] == counting.question(number).text
    assert write_vlmevalkit_table(counting, results_of(counting), out, repeat=1) == 12
    assert {row["prediction"] for row in read_tsv(out)} == {"again"}


def test_odd_predictions_survive(counting, tmp_path):
    texts = ['a\tb "c"', "two\nlines", "", "None", "'", "é\u2028", "=1+1", '"', "B", "B.", "(B)", "b"]
    write_vlmevalkit_table(counting, results_of(counting, texts), tmp_path / "out.tsv")
    assert [row["prediction"] for row in read_tsv(tmp_path / "out.tsv")] == texts


def test_vlmevalkit_scores_the_table_as_compat_does(counting, tmp_path):
    pandas = pytest.importorskip("pandas")
    can_infer = vlmeval_functions("utils/matching_util.py", "can_infer", "can_infer_option", "can_infer_text")[0]
    build_choices, prefetch = vlmeval_functions(
        "dataset/utils/multiple_choice.py", "build_choices", "prefetch_answer", can_infer=can_infer, pd=pandas
    )
    draw = random.Random(0)
    forms = ("{}", "({})", "**{}**", "{}.", "It is {}", "b", "Both A and B", "12", "Z")
    texts = [draw.choice(forms).format(draw.choice("ABCD")) for _ in range(12)]
    write_vlmevalkit_table(counting, results_of(counting, texts), tmp_path / "out.tsv")
    table = pandas.read_csv(tmp_path / "out.tsv", sep="\t")
    for number, text in enumerate(texts):
        item, question = table.iloc[number], counting.question(number)
        assert build_choices(item).keys() == question.choices.keys()
        verdict = judge(question, text, "compat")
        assert (prefetch(item) or None) == verdict.extracted
        assert (prefetch(item) == item["answer"]) == bool(verdict.correct)


def test_the_log_of_lmms_eval(counting, tmp_path):
    write_lmms_eval_log(counting, results_of(counting), tmp_path / "logs" / "log.json", task="mmstar", model="m")
    log = json.loads((tmp_path / "logs" / "log.json").read_text(encoding="utf-8"))
    assert log["model_configs"]["task"] == "mmstar" and log["args"] == {"model": "m", "model_args": "", "limit": None}
    assert log["logs"][3] == {"doc_id": 3, "resps": [["answer 3"]]}
    with pytest.raises(ValueError, match=r"the log must be a \.json file"):
        write_lmms_eval_log(counting, results_of(counting), tmp_path / "log.txt", task="mmstar", model="m")


def test_a_failed_answer_is_marked_and_a_missing_one_refused(counting, tmp_path):
    results = results_of(counting)
    failed = [Result.failed("3", 0, "out of memory", 0), *(result for result in results if result.id != "3")]
    write_vlmevalkit_table(counting, failed, tmp_path / "out.tsv")
    assert read_tsv(tmp_path / "out.tsv")[3]["prediction"] == FAILED
    before = (tmp_path / "out.tsv").read_bytes()
    missing = "for each of 12 rows, got none for 1, the first of which is '3'"
    with pytest.raises(ValueError, match=missing):
        write_vlmevalkit_table(counting, failed[1:], tmp_path / "out.tsv")
    assert (tmp_path / "out.tsv").read_bytes() == before
    with pytest.raises(ValueError, match=missing):
        write_lmms_eval_log(counting, failed[1:], tmp_path / "log.json", task="t", model="m")


def test_only_a_tsv_has_the_columns(tmp_path):
    benchmark = CountingBenchmark(2, tmp_path / "test.parquet")
    with pytest.raises(ValueError, match="data must be a VLMEvalKit TSV"):
        write_vlmevalkit_table(benchmark, results_of(benchmark), tmp_path / "out.tsv")
