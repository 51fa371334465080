"""The metrics of a run: what ``Benchmark.tally`` and ``derive`` make of its results, with intervals."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from llava_cot.evaluate.benchmark import Benchmark
from llava_cot.evaluate.result import Result, Scored
from llava_cot.evaluate.statistics import (
    Interval,
    Sums,
    bootstrap,
    clustered_interval,
    interval_from_error,
    majority,
    pass_at_k,
)
from llava_cot.text import normalise

Repeats = dict[int, list[Scored]]
NOTHING = 0.0, 0.0  # what a group adds to a metric that it has nothing to do with


@dataclass(frozen=True)
class Estimate:
    """A metric with its 95 % interval.

    Attributes:
        value: in [0, 1]; None if no question has to do with the metric.
        n: the denominator, such as a number of questions; None for a metric that is made of others.
    """

    value: float | None
    interval: Interval
    n: float | None

    def to_dict(self) -> dict[str, object]:
        """A mapping that JSON can hold."""
        return {"value": self.value, "interval": list(self.interval), "n": self.n and _whole(self.n)}


class Right(NamedTuple):
    """In which repeats a question is right, or a whole group where the headline counts groups."""

    group: str
    repeats: Mapping[int, bool]


def group_of(scored: Scored) -> str:
    """The group of a question; without one, a question is a group of its own."""
    return scored.question.group or scored.question.id


def by_group(scored: Iterable[Scored]) -> dict[str, Repeats]:
    """Return the results of each group in each of its repeats."""
    found: dict[str, Repeats] = defaultdict(lambda: defaultdict(list))
    for each in scored:
        found[group_of(each)][each.result.repeat].append(each)
    return {group: dict(repeats) for group, repeats in found.items()}


def group_sums(benchmark: Benchmark, groups: Mapping[str, Repeats], unknown: float = 0.0) -> Sums:
    """Return what each group adds to the metrics of ``Benchmark.tally``: the mean over its repeats.

    Args:
        groups: as ``by_group`` returns them.
        unknown: the score of an answer that has none, because it was not parsed, not judged or not given: 0 for the
            lower bound of a metric and 1 for the upper.
    """
    tallies = [[_tally(benchmark, some, unknown) for _, some in sorted(repeats.items())] for repeats in groups.values()]
    names = tuple(dict.fromkeys(name for repeats in tallies for tally in repeats for name in tally))
    sums = [
        [sum(tally.get(name, NOTHING)[part] for tally in repeats) / len(repeats) for name in names for part in (0, 1)]
        for repeats in tallies
    ]
    parts = np.array(sums, dtype=float).reshape(len(tallies), len(names), 2)
    return Sums(names, parts[..., 0], parts[..., 1])


def measure(benchmark: Benchmark, sums: Sums, only: str | None = None) -> dict[str, Estimate]:
    """Return every metric with its interval, or only the one of this name.

    The interval of a tallied metric is Wilson's with the effective sample size. That of a metric that ``derive`` makes
    of others comes from a bootstrap over groups.
    """
    values = benchmark.derive(sums.metrics()) if sums.names else {}
    found, drawn = {}, None
    for name, value in values.items() if only is None else [(only, values.get(only, math.nan))]:
        if math.isnan(value):
            found[name] = Estimate(None, (0.0, 1.0), 0)
            continue
        if not -1e-9 <= value <= 1 + 1e-9:
            raise ValueError(f"metric {name!r} of {benchmark.name} must be in [0, 1], got {value}")
        if name in sums.names:
            at = sums.names.index(name)
            parts = sums.numerators[:, at], sums.denominators[:, at]
            found[name] = Estimate(value, clustered_interval(*parts), float(parts[1].sum()))
            continue
        drawn = bootstrap(sums, benchmark.derive) if drawn is None else drawn
        error = float(np.nanstd(drawn[name]))
        found[name] = Estimate(value, interval_from_error(value, error, len(sums.numerators)), None)
    return found


def headline(benchmark: Benchmark, scored: Iterable[Scored], unknown: float = 0.0) -> Estimate:
    """Return the benchmark's published metric of these results."""
    sums = group_sums(benchmark, by_group(scored), unknown)
    return measure(benchmark, sums, benchmark.headline)[benchmark.headline]


def rights(benchmark: Benchmark, groups: Mapping[str, Repeats]) -> dict[str, Right]:
    """Return in which repeats each question is right, by id, or each group where the headline is about whole groups.

    The headline is about groups if every group adds 0 or 1 to it, and 1 to its denominator. Then the names are those of
    the groups. An answer without a score is not right.
    """
    parts = {
        group: {repeat: _tally(benchmark, some, 0.0).get(benchmark.headline) for repeat, some in repeats.items()}
        for group, repeats in groups.items()
    }
    if all(part in ((0, 1), (1, 1)) for repeats in parts.values() for part in repeats.values()):
        return {
            group: Right(group, {repeat: part == (1, 1) for repeat, part in repeats.items()})
            for group, repeats in parts.items()
        }
    found: dict[str, tuple[str, dict[int, bool]]] = {}
    for group, repeats in groups.items():
        for repeat, some in repeats.items():
            for each in some:
                found.setdefault(each.question.id, (group, {}))[1][repeat] = each.result.correct is True
    return {id: Right(*right) for id, right in found.items()}


def measure_pass_at_k(benchmark: Benchmark, groups: Mapping[str, Repeats], k: int) -> Estimate:
    """Return pass@k: the chance that one of ``k`` repeats is right. Questions with fewer repeats are left out."""
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for right in rights(benchmark, groups).values():
        if len(right.repeats) >= k:
            sums[right.group][0] += pass_at_k(len(right.repeats), sum(right.repeats.values()), k)
            sums[right.group][1] += 1
    parts = np.array(list(sums.values())).reshape(-1, 2)
    n = float(parts[:, 1].sum())
    value = float(parts[:, 0].sum() / n) if n else None
    return Estimate(value, clustered_interval(parts[:, 0], parts[:, 1]), n)


def measure_majority_at_k(benchmark: Benchmark, groups: Mapping[str, Repeats], k: int) -> Estimate:
    """Return the headline if each question is answered by the majority of its first ``k`` repeats.

    Answers are equal if ``llava_cot.text.normalise`` makes the same of what the rules extracted, or of the conclusion
    where they extracted nothing. Ties go to the earlier answer. Questions with fewer repeats are left out.
    """
    answers: dict[str, list[Scored]] = defaultdict(list)
    for repeats in groups.values():
        for _, some in sorted(repeats.items()):
            for each in some:
                answers[each.question.id].append(each)
    return headline(benchmark, [elect(some[:k]) for some in answers.values() if len(some) >= k])


def elect(answers: Sequence[Scored]) -> Scored:
    """Return the first of the answers that most agree with, as if it were the only repeat."""
    votes = [(at, vote) for at, each in enumerate(answers) if (vote := _vote(each.result))]
    chosen = answers[votes[majority([vote for _, vote in votes])][0] if votes else 0]
    return Scored(chosen.question, replace(chosen.result, repeat=0))


def _vote(result: Result) -> str:
    return _normalised(result.conclusion if result.extracted is None else result.extracted)


_normalised = lru_cache(maxsize=2**16)(normalise)


def _tally(benchmark: Benchmark, some: Sequence[Scored], unknown: float) -> Mapping[str, tuple[float, float]]:
    scores = [unknown if each.result.score is None else each.result.score for each in some]
    return benchmark.tally([each.question for each in some], scores)


def _whole(number: float) -> float | int:
    return round(number) if abs(number - round(number)) < 1e-9 else number
