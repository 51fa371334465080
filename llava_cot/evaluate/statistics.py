"""Statistics of accuracies: intervals, clustered by groups where there are some, paired tests, and repeats.

A metric is a ratio: what all groups add to its numerator over what they add to its denominator. A group is what belongs
together, such as the questions about one figure, and groups are independent of each other. Whatever is resampled here
is a group, never a question.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import comb, isnan, sqrt
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
CONFIDENCE = 0.95
AT_ONCE = 2**21  # draws that are held at a time, 16 MiB

Interval = tuple[float, float]
Derive = Callable[[Mapping[str, float]], Mapping[str, float]]


@dataclass(frozen=True)
class Sums:
    """What each group adds to each metric.

    Attributes:
        names: of the M metrics.
        numerators, denominators: float64 ``[G, M]``. A group that has nothing to do with a metric adds 0 to both.
    """

    names: tuple[str, ...]
    numerators: NDArray[np.float64]
    denominators: NDArray[np.float64]

    def metrics(self) -> dict[str, float]:
        """Each metric over all groups; NaN if nothing has to do with it."""
        return dict(zip(self.names, _ratios(self.numerators.sum(0), self.denominators.sum(0)).tolist()))


def wilson(correct: float, n: float, confidence: float = CONFIDENCE) -> Interval:
    """Return Wilson's score interval of the proportion ``correct / n``, which also holds near 0 and 1.

    Both may be fractions, as an effective sample size is. Without any question the interval is (0, 1).

    Raises:
        ValueError: ``correct`` is not in [0, n].
    """
    if not 0 <= correct <= n * (1 + 1e-12):
        raise ValueError(f"correct must be in [0, n={n}], got {correct}")
    if n == 0:
        return 0.0, 1.0
    z, p = NormalDist().inv_cdf((1 + confidence) / 2), min(1.0, correct / n)
    center, half = p + z * z / (2 * n), z * sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = ((center + side * half) / (1 + z * z / n) for side in (-1, 1))
    return (0.0 if p == 0 else low), (1.0 if p == 1 else high)  # not 1e-18 and its like


def standard_error(numerators: NDArray[np.float64], denominators: NDArray[np.float64]) -> float:
    """Return the clustered standard error of a ratio, by linearisation, as survey software computes it.

    Args:
        numerators, denominators: of each group, ``[G]``. NaN is returned for fewer than two groups.
    """
    groups, total = len(numerators), float(denominators.sum())
    if groups < 2 or total == 0:
        return float("nan")
    residuals = numerators - numerators.sum() / total * denominators
    return sqrt(groups / (groups - 1) * float(residuals @ residuals)) / total


def clustered_interval(
    numerators: NDArray[np.float64], denominators: NDArray[np.float64], confidence: float = CONFIDENCE
) -> Interval:
    """Return an interval of a ratio in [0, 1] of independent groups: Wilson's with the effective sample size.

    The effective sample size is the denominator divided by the design effect, which is the squared clustered standard
    error over that of as many independent questions (Franco, Little, Louis and Slud, 2019). Without groups the result
    is exactly Wilson's interval. Where all groups agree there is no error to estimate, and each group counts once.

    Args:
        numerators, denominators: of each group, ``[G]``.
    """
    taking_part = denominators > 0
    numerators, denominators = numerators[taking_part], denominators[taking_part]
    n = float(denominators.sum())
    p = min(1.0, float(numerators.sum()) / n) if n else 0.0
    error, plain = standard_error(numerators, denominators), p * (1 - p)
    size = float(len(numerators))
    if error > 1e-9 and plain > 0 and n > 1:
        size = n * plain / (n - 1) / error**2
    return wilson(p * size, size, confidence)


def interval_from_error(value: float, error: float, groups: int, confidence: float = CONFIDENCE) -> Interval:
    """Return Wilson's interval of a metric in [0, 1] whose standard error was found by resampling.

    Args:
        groups: how many there are, which is the sample size where the error is 0 or unknown.
    """
    plain = value * (1 - value)
    size = plain / error**2 if error > 1e-9 and plain > 0 else float(groups)
    return wilson(value * size, size, confidence)


def bootstrap(
    sums: Sums, derive: Derive, *, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, NDArray[np.float64]]:
    """Return every metric of ``derive`` in each resample of the groups, ``[resamples]``; NaN where it has no value.

    Groups that add the same to all metrics are drawn as one kind, since only their count in a resample matters. There
    are often only a few kinds, and then the time hardly depends on the number of groups.
    """
    table = np.hstack([sums.numerators, sums.denominators])
    groups = len(table)
    if not groups:
        raise ValueError("sums must have a group, got none")
    kinds, counts = np.unique(table, axis=0, return_counts=True)
    rng = np.random.default_rng(seed)
    step = max(1, AT_ONCE // groups)
    sizes = [min(step, resamples - start) for start in range(0, resamples, step)]
    totals = np.concatenate([_resample(rng, counts, size) @ kinds for size in sizes])
    ratios = _ratios(*np.split(totals, 2, axis=1))
    found = [derive(dict(zip(sums.names, row))) for row in ratios.tolist()]
    return {name: np.array([metrics[name] for metrics in found], dtype=float) for name in found[0]}


def percentiles(values: NDArray[np.float64], confidence: float = CONFIDENCE) -> Interval:
    """Return the interval that holds the middle of ``values``, apart from NaN; (NaN, NaN) if nothing is left."""
    kept = values[~np.isnan(values)]
    if not len(kept):
        return float("nan"), float("nan")
    low, high = np.quantile(kept, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def mcnemar(won: int, lost: int) -> float:
    """Return the two-sided p-value of McNemar's exact test.

    Args:
        won, lost: how many questions only the one and only the other has right. The test supposes that questions are
            independent of each other.
    """
    try:
        from scipy.stats import binomtest
    except ModuleNotFoundError:
        raise ValueError("McNemar's test needs the scipy package: pip install 'llava-cot[evaluate]'") from None
    return float(binomtest(won, won + lost).pvalue) if won + lost else 1.0


def pass_at_k(n: int, right: int, k: int) -> float:
    """Return the unbiased estimate of the chance that one of ``k`` answers is right, if ``right`` of ``n`` are.

    1 - C(n - right, k) / C(n, k), from Chen et al., 2021 (arXiv:2107.03374), section 2.1.

    Raises:
        ValueError: ``k`` is not in [1, n], or ``right`` not in [0, n].
    """
    if not 1 <= k <= n:
        raise ValueError(f"k must be in [1, n={n}], got {k}")
    if not 0 <= right <= n:
        raise ValueError(f"right must be in [0, n={n}], got {right}")
    return 1 - comb(n - right, k) / comb(n, k)


def majority(votes: Sequence[str]) -> int:
    """Return the place of the first vote for what most vote for. Ties go to what was voted for earlier.

    Raises:
        ValueError: nobody votes.
    """
    if not votes:
        raise ValueError("votes must not be empty")
    ((winner, _),) = Counter(votes).most_common(1)  # equal counts stand in the order in which they were first seen
    return votes.index(winner)


def known(value: float) -> float | None:
    """Return ``value``, or None for NaN, which JSON does not have."""
    return None if isnan(value) else value


def _resample(rng: np.random.Generator, counts: NDArray[np.int64], size: int) -> NDArray[np.float64]:
    """Draw as many groups as there are, with replacement, ``size`` times. Returns how often each kind was drawn.

    Args:
        counts: of the groups of each kind, ``[K]``.

    Returns:
        ``[size, K]``.
    """
    kinds, groups = len(counts), int(counts.sum())
    if 8 * kinds < groups:  # a count takes about as long as eight draws
        return rng.multinomial(groups, counts / groups, size=size).astype(float)
    drawn = np.repeat(np.arange(kinds), counts)[rng.integers(groups, size=(size, groups))]
    drawn += kinds * np.arange(size)[:, None]
    return np.bincount(drawn.ravel(), minlength=size * kinds).reshape(size, kinds).astype(float)


def _ratios(numerators: NDArray[np.float64], denominators: NDArray[np.float64]) -> NDArray[np.float64]:
    nothing = np.full(np.shape(denominators), np.nan)
    return np.divide(numerators, denominators, out=nothing, where=denominators > 0)
