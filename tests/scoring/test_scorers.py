"""Every scorer against its definition, in float64 where it is of numbers."""

import math
import re

import numpy as np
import pytest

from llava_cot.scoring import (
    SCORERS,
    Borda,
    ByStage,
    Calibration,
    Span,
    Weighted,
    confidence,
    diagnose,
    groupwise,
    lowest_group,
    negative_entropy,
    self_certainty,
    self_consistency,
    tail,
    vote,
)
from llava_cot.scoring.confidence import WINDOW
from llava_cot.scoring.scorer import ask, is_groupwise


def span(text="", logprobs=(-0.5,), stage=None, closed=True, **more):
    logprobs = list(logprobs)
    return Span(text, [7] * len(logprobs), logprobs, [0.1] * len(logprobs), stage=stage, closed=closed, **more)


def run(scorer, spans):
    """A scorer that wants nothing of the engine."""
    program = ask(scorer, spans)
    try:
        next(program)
    except StopIteration as stop:
        return list(stop.value)
    raise AssertionError("it asked for something")


@pytest.mark.parametrize("length", [1, 2, WINDOW - 1, WINDOW, WINDOW + 1, 101])
def test_statistics_of_tokens(length):
    draw = np.random.default_rng(length)
    logprobs, entropies, certainties = -draw.exponential(size=(3, length))
    one = Span("", [0] * length, logprobs.tolist(), entropies.tolist(), certainties.tolist())
    windows = [logprobs[at : at + WINDOW].mean() for at in range(max(1, length - WINDOW + 1))]
    expected = {
        confidence: logprobs.mean(),
        lowest_group: min(windows),
        tail: logprobs[-WINDOW:].mean(),
        negative_entropy: -entropies.mean(),
        self_certainty: certainties.mean(),
    }
    for scorer, value in expected.items():
        assert scorer([one])[0] == pytest.approx(value, abs=1e-12)


def test_no_tokens_at_all():
    for scorer in (confidence, lowest_group, tail, negative_entropy, self_certainty):
        assert scorer([Span("", [], [], [])]) == [0.0]


def caption(*facts, logprob=-0.5, intro="I see", closed=True):
    return span(f"<CAPTION> {intro} {'; '.join(facts)}. </CAPTION>", [logprob], "CAPTION", closed)


def test_the_medoid_of_the_largest_cluster_is_first():
    common = ["top: red circle", "left: blue square", "right: green circle", "bottom: red square"]
    spans = [
        caption("center: yellow square", "left: red square"),  # alone
        caption(*common, "center: blue square"),
        caption(*common),
        caption(*common, "center: red square"),
        caption("top left: red circle", closed=False),
    ]
    scores = self_consistency(spans)
    assert max(scores) == scores[2] and sorted(scores, reverse=True)[:3] == [scores[2], *sorted(scores[1:4:2])[::-1]]
    assert scores[0] < 0.3 and scores[4] < 0.3
    sure = [caption(*common, logprob=-0.1), caption(*common, logprob=-0.9)]
    assert self_consistency(sure)[0] > self_consistency(sure)[1]


def test_a_vote_counts_what_means_the_same():
    texts = ["<CONCLUSION> 1,000 </CONCLUSION>", "<CONCLUSION> 1000.0. </CONCLUSION>", "<CONCLUSION> 7 </CONCLUSION>"]
    spans = [span(text, [lp], "CONCLUSION") for text, lp in zip(texts, (-1.0, -2.0, -0.1))]
    weights = [math.exp(-1.0), math.exp(-2.0), math.exp(-0.1)]
    total = sum(weights)
    expected = [(weights[0] + weights[1]) / total] * 2 + [weights[2] / total]
    assert vote(spans) == pytest.approx(expected)
    whole = [span(f"<REASONING> {n} </REASONING>" + text) for n, text in enumerate(texts)]
    assert vote(whole)[0] == vote(whole)[1] > vote(whole)[2]  # of whole answers the conclusions vote
    assert vote([*spans[:2], span(texts[2], [-0.1], "CONCLUSION", closed=False)])[2] == 0.0


def constant(*values, name="constant"):
    def scorer(spans):
        return list(values)

    scorer.__name__ = name
    return scorer


def test_borda_and_weighted():
    spans = [span(stage="CAPTION") for _ in range(4)]
    one, other = constant(1.0, 2.0, 2.0, 9.0, name="one"), constant(-5.0, -6.0, -7.0, -8.0, name="other")
    # Shares of the others that are worse, ties half: 0, 1/2, 1/2, 1 and 1, 2/3, 1/3, 0.
    assert run(Borda({one: 3, other: 1}), spans) == pytest.approx([1 / 4, (1.5 + 2 / 3) / 4, (1.5 + 1 / 3) / 4, 3 / 4])
    assert spans[3].notes == {"one": 9.0, "other": -8.0}
    calibration = Calibration.fit("one", "a line", {"CAPTION": [0.0, 10.0]})
    known = run(Weighted({one: 1, other: 1}, [calibration]), spans)
    assert known == pytest.approx([(0.1 - 5) / 2, (0.2 - 6) / 2, (0.2 - 7) / 2, (0.9 - 8) / 2], abs=0.01)
    for weights in ({}, {one: -1}, {one: 0}):
        with pytest.raises(ValueError, match="weights must be >= 0 and not all 0"):
            Borda(weights)


def test_by_stage_sends_every_candidate_to_its_scorer():
    captions = [span(stage="CAPTION"), span(stage="CAPTION")]
    spans = [captions[0], span(stage="REASONING"), captions[1], span()]
    scorer = ByStage({"CAPTION": constant(1.0, 2.0)}, default=lambda spans: [5.0] * len(spans))
    assert run(scorer, spans) == [1.0, 5.0, 2.0, 5.0]
    assert not is_groupwise(scorer) and is_groupwise(ByStage({"CAPTION": vote}, default=confidence))


def test_what_the_names_stand_for():
    assert {name for name, scorer in SCORERS.items() if is_groupwise(scorer)} == {
        "self_consistency",
        "vote",
        "look_ahead",
        "by_stage",
    }
    assert groupwise(lambda spans: []).groupwise


def test_diagnosis():
    scores = [[0.9, 0.1, 0.5], [0.2, 0.8], [0.3, 0.3], [1.0, math.nan]]
    right = [[True, False, False], [True, False], [True, True], [True, False]]
    found = diagnose(scores, right)
    assert found.questions == 4 and found.oracle == 1.0 and found.selected == 0.75
    assert found.mean == pytest.approx((1 / 3 + 0.5 + 1 + 0.5) / 4)
    assert found.auc == pytest.approx((1.0 + 0.0 + 1.0) / 3)
    assert found.realised == pytest.approx((0.75 - found.mean) / (1 - found.mean))
    assert found.verdict.startswith("search can help: AUC 0.67")


@pytest.mark.parametrize(
    "scores, right, verdict",
    [
        ([[0.1, 0.9]] * 9, [[True, True]] * 9, "right or wrong together"),
        ([[0.1, 0.9], [0.9, 0.1]] * 9, [[True, False]] * 18, r"hardly tells right from wrong \(AUC 0.50\)"),
    ],
)
def test_where_search_cannot_help(scores, right, verdict):
    assert re.search("search cannot help here: .*" + verdict, diagnose(scores, right).verdict)


def test_a_choice_that_greedy_decoding_makes_too_is_worth_nothing():
    scores, right = [[0.1, 0.9], [0.9, 0.1], [0.2, 0.3]], [[False, True], [True, False], [True, False]]
    assert diagnose(scores, right, greedy=0.5).verdict.startswith("search can help")
    assert "no better than greedy decoding (66.0%)" in diagnose(scores, right, greedy=0.66).verdict


def test_what_is_no_labelled_set():
    with pytest.raises(ValueError, match="is_right must have one value per score"):
        diagnose([[0.1]], [[True, False]])
    with pytest.raises(ValueError, match="scores must have at least one candidate, got none"):
        diagnose([[]], [[]])
