"""The summary of a run: what counts, what is unknown, what belongs together, and repeats."""

import json
from itertools import product

import pytest
from helpers.runs import Circular, Graded, Letters, Mean, result, scored

from llava_cot.evaluate.metrics import by_group, elect, measure_pass_at_k
from llava_cot.evaluate.pages.markdown import escape, to_markdown
from llava_cot.evaluate.result import Scored
from llava_cot.evaluate.statistics import pass_at_k, wilson
from llava_cot.evaluate.summary import summarise, to_text


def test_unparsed_and_failed_answers_are_counted_apart_and_bound_the_accuracy():
    rows = scored(Letters(), [1.0] * 10 + [0.0] * 5 + [None] * 3 + ["failed"] * 2)
    found = summarise(Letters(), rows, {"rules": "strict"})
    assert (found["n"], found["correct"], found["accuracy"]) == (20, 10, 0.5)
    assert found["interval"] == pytest.approx(wilson(10, 20)) and found["bounds"] == [0.5, 0.75]
    assert (found["unparsed"], found["failed"], found["ungraded"], found["results"]) == (3, 2, 0, 20)
    assert found["outcomes"] == {"complete": 18, "unclosed": 0, "missing": 0, "repeated": 0, "failed": 2}
    assert found["rules"] == {"letter": 18, "no answer": 2}
    assert found["usage"]["seconds"] == {"total": 9, "mean": 0.5}
    assert found["usage"]["generated_tokens"]["total"] == sum(range(100, 118))
    assert found["protocol"] == {"rules": "strict"} and found["repeats"] == 1 and found["pass_at_k"] == {}
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert "accuracy 50.0% (29.9% to 70.1%), 10 of 20 right" in to_text(found)


def test_categories_have_the_headline_at_every_depth():
    found = summarise(Letters(), scored(Letters(), [1.0, 0.0] * 10), {})
    rows = {tuple(row["category"]): (row["n"], row["correct"], row["accuracy"]) for row in found["categories"]}
    assert rows == {
        ("even",): (10, 10, 1.0),
        ("even", "fours"): (5, 5, 1.0),
        ("even", "twos"): (5, 5, 1.0),
        ("odd",): (10, 0, 0.0),
    }


def test_a_group_counts_once_and_an_unknown_rotation_is_enough():
    scores = [1.0] * 8 + [1.0, 1.0, None, 1.0] + [1.0, 0.0, None, 1.0]
    found = summarise(Circular(), scored(Circular(), scores), {})
    assert (found["n"], found["correct"], found["accuracy"], found["bounds"]) == (4, 2, 0.5, [0.5, 0.75])
    assert found["interval"] == pytest.approx(wilson(2, 4))
    assert found["metrics"]["accuracy"]["value"] == 13 / 16 and found["unparsed"] == 2
    assert found["categories"][0]["n"] == 4


def test_a_headline_that_is_made_of_others_has_an_interval_from_the_bootstrap():
    rows = scored(Mean(), ([1.0] * 4 + [1.0, 0.0, 0.0, 1.0]) * 5)
    found = summarise(Mean(), rows, {})
    assert found["accuracy"] == pytest.approx((0.5 + 0.75) / 2)
    assert (found["n"], found["correct"]) == (40, 30)
    low, high = found["interval"]
    one, other = found["metrics"]["circular"]["interval"], found["metrics"]["accuracy"]["interval"]
    assert low < found["accuracy"] < high and other[1] - other[0] < high - low < one[1] - one[0]
    assert found["metrics"]["mean"]["n"] is None
    everything = summarise(Mean(), scored(Mean(), [1.0] * 40), {})
    assert everything["accuracy"] == 1 and everything["interval"] == pytest.approx(wilson(10, 10))


def test_grades_that_nobody_gave_are_ungraded():
    found = summarise(Graded(), scored(Graded(), [None] * 6), {})
    assert (found["accuracy"], found["bounds"], found["ungraded"], found["unparsed"]) == (0.0, [0.0, 1.0], 6, 0)
    found = summarise(Graded(), scored(Graded(), [0.4, 0.6, 1.0, 0.5, None, "failed"]), {})
    assert found["accuracy"] == pytest.approx(2.5 / 6) and found["correct"] == 2.5
    assert found["metrics"]["c0"] == {
        "value": pytest.approx(0.45),
        "interval": found["metrics"]["c0"]["interval"],
        "n": 2,
    }


def test_repeats_are_averaged_within_a_question():
    rows = [
        each
        for repeat, scores in enumerate(([1.0, 0.0, 1.0], [1.0, 1.0, 0.0]))
        for each in scored(Letters(), scores, repeat)
    ]
    found = summarise(Letters(), rows, {})
    assert (found["n"], found["correct"], found["repeats"], found["results"]) == (3, 2, 2, 6)
    assert found["accuracy"] == pytest.approx(2 / 3)
    once = [Scored(each.question, result(0, score)) for each, score in zip(rows[:3], (1.0, 0.5, 0.5))]
    assert found["interval"] == pytest.approx(
        summarise(
            Letters(),
            [Scored(s.question, result(n, score)) for n, (s, score) in enumerate(zip(once, (1.0, 0.5, 0.5)))],
            {},
        )["interval"]
    )
    assert list(found["pass_at_k"]) == list(found["majority_at_k"]) == ["1", "2"]
    assert found["pass_at_k"]["1"]["value"] == pytest.approx(2 / 3) and found["pass_at_k"]["2"]["value"] == 1.0


def test_circular_groups_are_right_within_a_repeat():
    """Each rotation is right in one of two repeats, and the group in neither."""
    rows = [*scored(Circular(), [1.0, 1.0, 0.0, 0.0], 0), *scored(Circular(), [0.0, 0.0, 1.0, 1.0], 1)]
    found = summarise(Circular(), rows, {})
    assert found["accuracy"] == 0.0 and found["pass_at_k"]["2"] == {
        "value": 0.0,
        "interval": [0.0, wilson(0, 1)[1]],
        "n": 1,
    }


def test_pass_at_k_is_the_mean_over_questions():
    table = [(1.0, 0.0, 0.0), (1.0, 1.0, 0.0), (0.0, None, "failed"), (1.0, 1.0, 1.0)]
    rows = [
        Scored(Letters().question(n), result(n, score, repeat))
        for n, scores in enumerate(table)
        for repeat, score in enumerate(scores)
    ]
    for k in (1, 2, 3):
        expected = sum(pass_at_k(3, right, k) for right in (1, 2, 0, 3)) / 4
        assert measure_pass_at_k(Letters(), by_group(rows), k).value == pytest.approx(expected)
    assert summarise(Letters(), rows, {})["pass_at_k"].keys() == {"1", "2", "3"}
    assert measure_pass_at_k(Letters(), by_group(rows), 4).value is None


def test_the_majority_answers_by_normalised_text_and_the_earlier_wins():
    question = Letters().question(0)

    def answers(*given):
        """Each is the extracted answer with its score, or a conclusion that nothing was extracted from."""
        return [
            Scored(question, result(0, score, repeat, extracted=extracted, conclusion=extracted or "?"))
            for repeat, (extracted, score) in enumerate(given)
        ]

    assert elect(answers(("1,000", 0.0), ("7", 1.0), ("1000.0", 0.0))).result.extracted == "1,000"
    assert elect(answers(("7", 1.0), ("8", 0.0), ("8", 0.0), ("7", 1.0))).result.extracted == "7"
    assert elect(answers((None, None), ("8", 0.0))).result.extracted is None
    failed = Scored(question, result(0, "failed"))
    assert elect([failed, *answers(("8", 0.0))]).result.extracted == "8" and elect([failed]).result.outcome == "failed"
    rows = [
        s
        for n, of in enumerate(product("AB", repeat=3))
        for s in (
            Scored(Letters().question(n), result(n, float(letter == "A"), repeat)) for repeat, letter in enumerate(of)
        )
    ]
    found = summarise(Letters(), rows, {})["majority_at_k"]
    assert [found[k]["value"] for k in ("1", "2", "3")] == [0.5, 0.5, 0.5] and found["3"]["n"] == 8


def test_a_run_without_results_has_a_summary():
    found = summarise(Letters(), [], {})
    assert (found["n"], found["correct"], found["accuracy"], found["interval"]) == (0, 0, None, [0.0, 1.0])
    assert "–" in to_markdown(found) and to_text(found)


def test_a_metric_must_be_a_fraction():
    class Percent(Letters):
        def derive(self, metrics):
            return {"accuracy": 100 * metrics["accuracy"]}

    with pytest.raises(ValueError, match=r"metric 'accuracy' of letters must be in \[0, 1\], got 100.0"):
        summarise(Percent(), scored(Percent(), [1.0]), {})


def test_markdown_says_everything_and_escapes_it():
    found = summarise(Letters(), scored(Letters(), [1.0, None]), {"model": "a|b <script>", "settings": {"x": [1]}})
    text = to_markdown(found)
    assert r"| model | a\|b \<script\> |" in text and r"| settings.x | [1] |" in text
    assert "**accuracy: 50.0%** (9.5% to 90.5%), 1 of 2 right." in text
    assert (
        "Bounds: 50.0% if no answer without a verdict was right, 100.0% if all were (1 unparsed, 0 ungraded, 0 failed)."
        in text
    )


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("[a](http://x)", r"[a\](http://x)"),
        ("[a][b] [c]: d", r"[a\][b] [c\]: d"),
        ("max_new_tokens _a_ 1 [2]", r"max_new_tokens \_a\_ 1 [2]"),
        ("a\n# b `c` **d**", r"a # b \`c\` \*\*d\*\*"),
    ],
)
def test_markup_is_escaped_and_the_rest_is_not(text, escaped):
    assert escape(text) == escaped
