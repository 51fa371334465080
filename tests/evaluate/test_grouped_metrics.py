"""The metrics of grouped benchmarks equal values by hand and a slow definition on random scores."""

import random
from collections import defaultdict

import pytest
from helpers.benchmark_files import hallusion_rows, write_hallusion_tsv, write_mmbench_tsv

from llava_cot.evaluate.benchmarks import open_benchmark


def metrics_of(benchmark, scores):
    """The metrics of all questions by way of the groups."""
    groups = defaultdict(list)
    for number, score in enumerate(scores):
        question = benchmark.question(number)
        groups[question.group].append((question, score))
    sums = defaultdict(lambda: [0.0, 0.0])
    for members in groups.values():
        questions, marks = zip(*members)
        for name, (part, whole) in benchmark.tally(questions, marks).items():
            sums[name][0] += part
            sums[name][1] += whole
    return benchmark.derive({name: part / whole for name, (part, whole) in sums.items()})


@pytest.fixture
def mmbench(tmp_path):
    write_mmbench_tsv(tmp_path / "data.tsv")  # questions 0, 1 and 2 have 4, 3 and 2 rotations
    return open_benchmark("mmbench", tmp_path / "data.tsv", allow_partial=True)


def test_circular_accuracy_by_hand(mmbench):
    groups = [mmbench.question(number).group for number in range(9)]
    assert sorted(groups) == list("000011122")
    last = {group: max(n for n in range(9) if groups[n] == group) for group in "012"}
    assert metrics_of(mmbench, [1.0] * 9) == {"circular_accuracy": 1.0, "accuracy": 1.0}
    scores = [float(number not in (last["0"], last["1"])) for number in range(9)]
    assert metrics_of(mmbench, scores) == {"circular_accuracy": 1 / 3, "accuracy": 7 / 9}


def slow_hallusion(rows, scores):
    """As VLMEvalKit's Hallusion_rating: all pairs that share a figure, and all that share a question."""
    seen = [(row, score) for row, score in zip(rows, scores) if row["visual_input"] != "0"]

    def share(part):
        named = [((row["subcategory"], row["set_id"], row[part]), score) for row, score in seen]
        keys = {key for key, _ in named}
        return sum(all(score == 1 for other, score in named if other == key) for key in keys) / len(keys)

    found = {
        "aAcc": sum(score for _, score in seen) / len(seen),
        "fAcc": share("figure_id"),
        "qAcc": share("question_id"),
    }
    blind = [score for row, score in zip(rows, scores) if row["visual_input"] == "0"]
    found["mean"] = (found["aAcc"] + found["fAcc"] + found["qAcc"]) / 3
    return found | ({"aAcc_without_image": sum(blind) / len(blind)} if blind else {})


@pytest.mark.parametrize("blind", [False, True])
def test_hallusion_metrics_equal_their_slow_definition(tmp_path, blind):
    write_hallusion_tsv(tmp_path / "data.tsv", blind=blind)
    benchmark = open_benchmark("hallusionbench", tmp_path / "data.tsv", allow_partial=True)
    rows = hallusion_rows(blind=blind)
    for seed in range(30):
        draw = random.Random(seed)
        scores = [float(draw.random() < 0.85) for _ in rows]
        assert metrics_of(benchmark, scores) == pytest.approx(slow_hallusion(rows, scores), abs=1e-12)


def test_hallusion_metrics_by_hand(tmp_path):
    rows = write_hallusion_tsv(tmp_path / "data.tsv", blind=False)
    benchmark = open_benchmark("hallusionbench", tmp_path / "data.tsv", allow_partial=True)
    # Figures and questions: VD ocr 0 to 1 and 0 to 2, VS ocr 1 to 2 and 0 to 1, VS chart 1 to 2 and 0 to 1, VD math
    # 0 to 1 and 0. One answer is wrong, about figure 1 of ocr, which VD and VS share.
    wrong = [row["index"] for row in rows].index("VS_ocr_1_0_1_1")
    scores = [float(number != wrong) for number in range(len(rows))]
    found = metrics_of(benchmark, scores)
    figures, questions = 3 + 2 + 2, 3 + 2 + 1
    expected = {"aAcc": 15 / 16, "fAcc": (figures - 1) / figures, "qAcc": (questions - 1) / questions}
    assert found == pytest.approx(expected | {"mean": sum(expected.values()) / 3}, abs=1e-12)
