"""Intervals, tests and estimators, against scipy, against brute force and by their coverage."""

from itertools import combinations, product

import numpy as np
import pytest

from llava_cot.evaluate.statistics import (
    Sums,
    bootstrap,
    clustered_interval,
    majority,
    mcnemar,
    pass_at_k,
    percentiles,
    standard_error,
    wilson,
)

stats = pytest.importorskip("scipy.stats")


@pytest.mark.parametrize("n", [1, 2, 7, 30, 1500])
def test_wilson_is_scipys(n):
    for correct in sorted({0, 1, n // 3, n - 1, n}):
        expected = stats.binomtest(correct, n).proportion_ci(0.95, "wilson")
        assert wilson(correct, n) == pytest.approx(expected, abs=1e-12)
        expected = stats.binomtest(correct, n).proportion_ci(0.8, "wilson")
        assert wilson(correct, n, 0.8) == pytest.approx(expected, abs=1e-12)


def test_wilson_at_the_edges():
    assert wilson(0, 0) == (0.0, 1.0) and wilson(0, 5)[0] == 0.0 and wilson(5, 5)[1] == 1.0
    with pytest.raises(ValueError, match=r"correct must be in \[0, n=3\], got 4"):
        wilson(4, 3)


def test_mcnemar_is_the_binomial_test():
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(0, 5) == pytest.approx(2 * 0.5**5)
    assert mcnemar(3, 9) == mcnemar(9, 3) == pytest.approx(2 * sum(stats.binom.pmf(k, 12, 0.5) for k in range(4)))


@pytest.mark.parametrize("n", [1, 4, 6])
def test_pass_at_k_is_the_share_of_draws_with_a_right_one(n):
    for right, k in product(range(n + 1), range(1, n + 1)):
        draws = [*combinations([True] * right + [False] * (n - right), k)]
        assert pass_at_k(n, right, k) == pytest.approx(sum(map(any, draws)) / len(draws))
    with pytest.raises(ValueError, match=rf"k must be in \[1, n={n}\], got {n + 1}"):
        pass_at_k(n, 0, n + 1)
    with pytest.raises(ValueError, match=rf"right must be in \[0, n={n}\], got -1"):
        pass_at_k(n, -1, 1)


@pytest.mark.parametrize(
    ("votes", "place"), [(["a"], 0), (["b", "a", "a"], 1), (["b", "a", "a", "b"], 0), (["c", "b", "a", "b", "a"], 1)]
)
def test_most_votes_win_and_ties_go_to_the_earlier(votes, place):
    assert majority(votes) == place


def test_nobody_votes():
    with pytest.raises(ValueError, match="votes must not be empty"):
        majority([])


@pytest.mark.parametrize(("correct", "n"), [(0, 9), (5, 9), (9, 9), (613, 1500), (1, 2), (0, 1)])
def test_groups_of_one_question_have_wilsons_interval(correct, n):
    numerators = np.r_[np.ones(correct), np.zeros(n - correct)]
    assert clustered_interval(numerators, np.ones(n)) == pytest.approx(wilson(correct, n), abs=1e-12)


def test_groups_that_agree_count_once():
    rng = np.random.default_rng(1)
    right = (rng.random(200) < 0.6).astype(float)
    grouped = clustered_interval(4 * right, np.full(200, 4.0))
    assert grouped == pytest.approx(wilson(right.sum(), 200), abs=1e-3)
    assert clustered_interval(np.full(5, 4.0), np.full(5, 4.0)) == wilson(5, 5)
    some = np.zeros(8)
    assert clustered_interval(np.r_[right, some], np.r_[np.ones(200), some]) == wilson(right.sum(), 200)


def test_the_standard_error_of_groups_of_one_is_the_binomial_one():
    right = np.r_[np.ones(30), np.zeros(70)]
    assert standard_error(right, np.ones(100)) == pytest.approx(np.sqrt(0.3 * 0.7 / 99))
    assert np.isnan(standard_error(np.ones(1), np.ones(1)))


def test_unequal_groups_have_the_jackknifes_standard_error():
    rng = np.random.default_rng(2)
    sizes = rng.integers(1, 9, 300).astype(float)
    right = rng.binomial(sizes.astype(int), rng.beta(2, 2, 300)).astype(float)
    without = (right.sum() - right) / (sizes.sum() - sizes)
    jackknife = np.sqrt(299 / 300 * ((without - without.mean()) ** 2).sum())
    assert standard_error(right, sizes) == pytest.approx(jackknife, rel=0.02)


def test_intervals_cover_the_truth_as_often_as_they_say():
    """60 groups of up to 6 questions that are mostly right or wrong together. Questions alone cover too rarely."""
    rng = np.random.default_rng(3)
    clustered = plain = 0
    rounds = 600
    for _ in range(rounds):
        sizes = rng.integers(2, 7, 60)
        right = rng.binomial(sizes, rng.beta(1.0, 1.0, 60)).astype(float)
        low, high = clustered_interval(right, sizes.astype(float))
        clustered += low <= 0.5 <= high
        low, high = wilson(right.sum(), sizes.sum())
        plain += low <= 0.5 <= high
    assert 0.92 < clustered / rounds < 0.98
    assert plain / rounds < 0.88


def of(numerators, denominators):
    return Sums(("accuracy",), np.reshape(numerators, (-1, 1)), np.reshape(denominators, (-1, 1)))


@pytest.mark.parametrize("is_graded", [False, True])
def test_resampled_groups_have_the_linearised_error(is_graded):
    rng = np.random.default_rng(4)
    sizes = rng.integers(1, 5, 400).astype(float)
    right = sizes * rng.random(400) if is_graded else rng.binomial(sizes.astype(int), 0.6).astype(float)
    drawn = bootstrap(of(right, sizes), dict, resamples=4000)["accuracy"]
    assert drawn.std() == pytest.approx(standard_error(right, sizes), rel=0.06)
    assert drawn.mean() == pytest.approx(right.sum() / sizes.sum(), abs=0.003)
    low, high = percentiles(drawn)
    assert (low, high) == pytest.approx(clustered_interval(right, sizes), abs=0.004)
    again = bootstrap(of(right, sizes), dict, resamples=4000)["accuracy"]
    assert (again == drawn).all() and (
        bootstrap(of(right, sizes), dict, seed=1, resamples=4000)["accuracy"] != drawn
    ).any()


@pytest.mark.parametrize("copies", [1, 20])
def test_resamples_are_plain_draws_of_groups(copies):
    """Equal groups are drawn as one kind; the distribution is that of drawing group by group."""
    numerators = np.tile([0.0, 1.0, 1.0, 2.0, 0.0], copies)
    denominators = np.tile([1.0, 1.0, 1.0, 3.0, 1.0], copies)
    drawn = bootstrap(of(numerators, denominators), dict, resamples=20_000)["accuracy"]
    groups = len(numerators)
    picks = np.random.default_rng(5).integers(0, groups, (20_000, groups))
    plain = numerators[picks].sum(1) / denominators[picks].sum(1)
    assert stats.ks_2samp(drawn, plain).statistic < 0.02


def test_a_resample_may_miss_a_metric():
    sums = Sums(("a", "b"), np.array([[1.0, 0], [0, 1], [1, 0]]), np.array([[1.0, 0], [1, 1], [1, 0]]))
    drawn = bootstrap(sums, lambda metrics: {"b": metrics["b"], "sum": metrics["a"] + metrics["b"]}, resamples=200)
    assert np.isnan(drawn["b"]).any() and (np.isnan(drawn["b"]) == np.isnan(drawn["sum"])).all()
    assert percentiles(drawn["b"]) == (1.0, 1.0)
    assert np.isnan(percentiles(np.array([np.nan]))).all()
    with pytest.raises(ValueError, match="sums must have a group, got none"):
        bootstrap(of([], []), dict)
