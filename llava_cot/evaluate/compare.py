"""Compare two runs on the same questions, in pairs."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llava_cot.evaluate.benchmark import Benchmark
from llava_cot.evaluate.folder import Run, open_evaluated
from llava_cot.evaluate.metrics import Estimate, Repeats, by_group, group_of, group_sums, measure, rights
from llava_cot.evaluate.pages.markdown import protocol_rows
from llava_cot.evaluate.result import Scored
from llava_cot.evaluate.statistics import Interval, Sums, bootstrap, mcnemar, percentiles


def compare_runs(a: Run, b: Run, data: Path | str | None = None) -> dict[str, Any]:
    """Return the comparison of two runs as a mapping that JSON can hold.

    ``difference`` is the headline of B less that of A, with a 95 % interval from a paired bootstrap: both runs are
    resampled by the same groups. ``pairs`` counts the questions, or the groups where the headline counts groups, that
    only one run has right, with the p-value of McNemar's exact test; it is None if a run has repeats. ``flips`` are the
    questions with different scores, and ``differs`` what differs in the protocols.

    Args:
        data: the benchmark's file; by default where run A found it.

    Raises:
        ValueError: the runs are of different questions, files or rules. The message names what differs.
    """
    _check_alike(a, b)
    path = data or (a.protocol.get("dataset") or {}).get("path")
    if path is not None and not Path(path).is_file():
        raise ValueError(f"data must be the benchmark's file, got {str(path)!r}, which does not exist")
    benchmark = open_evaluated(a.protocol, data, "the runs")
    of_a, of_b = a.scored(benchmark), b.scored(benchmark)
    _check_same_questions((a, of_a), (b, of_b))
    groups_a = by_group(of_a)
    found_b = by_group(of_b)
    groups_b = {group: found_b[group] for group in groups_a}
    sums = group_sums(benchmark, groups_a), group_sums(benchmark, groups_b)
    mains = [measure(benchmark, each, benchmark.headline)[benchmark.headline] for each in sums]
    value = None if None in (mains[0].value, mains[1].value) else (mains[1].value or 0.0) - (mains[0].value or 0.0)
    return {
        "benchmark": benchmark.name,
        "title": benchmark.title,
        "headline": benchmark.headline,
        "n": len({each.question.id for each in of_a}),
        "groups": len(groups_a),
        "a": _side(a, mains[0], of_a),
        "b": _side(b, mains[1], of_b),
        "difference": {"value": value, "interval": list(_paired_interval(benchmark, *sums))},
        "pairs": _pairs(benchmark, groups_a, groups_b),
        "differs": differences(a.protocol, b.protocol),
        "flips": _flips(of_a, of_b),
    }


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what differs in two protocols: the name of each value, with dots where it is nested, and both values."""
    one, two = dict(protocol_rows(a)), dict(protocol_rows(b))
    names = [name for name in {**one, **two} if one.get(name) != two.get(name)]
    return [{"name": name, "a": one.get(name), "b": two.get(name)} for name in names]


def _check_alike(a: Run, b: Run) -> None:
    for what, one, two in (
        ("benchmark", a.protocol["benchmark"], b.protocol["benchmark"]),
        ("file", _md5(a), _md5(b)),
        ("rules", a.protocol["rules"], b.protocol["rules"]),
    ):
        if one != two:
            advice = "; `llava-cot score` can give both the same rules" if what == "rules" else ""
            raise ValueError(
                f"runs must have the same {what}, got {one!r} in {str(a.path)!r} and {two!r} in {str(b.path)!r}{advice}"
            )


def _check_same_questions(*runs: tuple[Run, Sequence[Scored]]) -> None:
    (a, one), (b, two) = ((run, {each.question.id for each in scored}) for run, scored in runs)
    if not one:
        raise ValueError(f"runs must have results, got none in {str(a.path)!r}")
    if one != two:
        parts = [
            f"{len(ids):,} only in {str(run.path)!r}, such as {min(ids)!r}"
            for run, ids in ((a, one - two), (b, two - one))
            if ids
        ]
        raise ValueError(f"runs must have the same questions, got {' and '.join(parts)}")


def _md5(run: Run) -> Any:
    return (run.protocol.get("dataset") or {}).get("md5")


def _side(run: Run, main: Estimate, scored: Sequence[Scored]) -> dict[str, Any]:
    tokens = [s.result.usage["generated_tokens"] for s in scored if "generated_tokens" in s.result.usage]
    return {
        "path": str(run.path),
        "model": run.protocol.get("model"),
        "search": run.protocol.get("search"),
        "repeats": len({each.result.repeat for each in scored}),
        "accuracy": main.value,
        "interval": list(main.interval),
        "unparsed": sum(s.result.score is None and s.result.outcome != "failed" for s in scored),
        "failed": sum(s.result.outcome == "failed" for s in scored),
        "tokens": sum(tokens) / len(tokens) if tokens else None,
    }


def _paired_interval(benchmark: Benchmark, a: Sums, b: Sums) -> Interval:
    """Return the 95 % interval of the difference of two headlines. Both are of the same groups in the same order."""
    both = Sums(
        (*(f"a {name}" for name in a.names), *(f"b {name}" for name in b.names)),
        np.hstack([a.numerators, b.numerators]),
        np.hstack([a.denominators, b.denominators]),
    )

    def derive(metrics: Mapping[str, float]) -> dict[str, float]:
        one, two = (
            benchmark.derive({name: metrics[f"{side} {name}"] for name in sums.names})[benchmark.headline]
            for side, sums in (("a", a), ("b", b))
        )
        return {"difference": two - one}

    return percentiles(bootstrap(both, derive)["difference"])


def _pairs(benchmark: Benchmark, a: Mapping[str, Repeats], b: Mapping[str, Repeats]) -> dict[str, Any] | None:
    one, two = rights(benchmark, a), rights(benchmark, b)
    if one.keys() != two.keys():  # graded answers may be whole in one run alone
        return None
    pairs = [(right.repeats, two[name].repeats) for name, right in one.items()]
    if any(len(repeats) > 1 for pair in pairs for repeats in pair):
        return None
    counts: dict[tuple[bool, bool], int] = defaultdict(int)
    for first, second in pairs:
        counts[any(first.values()), any(second.values())] += 1
    only_a, only_b = counts[True, False], counts[False, True]
    return {
        "of": "groups" if one.keys() <= a.keys() and len(one) < sum(map(_questions, a.values())) else "questions",
        "both": counts[True, True],
        "only_a": only_a,
        "only_b": only_b,
        "neither": counts[False, False],
        "mcnemar": mcnemar(only_b, only_a),
    }


def _questions(repeats: Repeats) -> int:
    return len({each.question.id for some in repeats.values() for each in some})


def _flips(a: Iterable[Scored], b: Iterable[Scored]) -> list[dict[str, Any]]:
    """Return the questions whose mean scores differ, with the first answer of each run."""
    one, two = _by_id(a), _by_id(b)
    flips = []
    for id, answers in one.items():
        scores = [sum(s.result.score or 0.0 for s in some) / len(some) for some in (answers, two[id])]
        if scores[0] != scores[1]:
            first, second = answers[0], two[id][0]
            flips.append({
                "id": id,
                "group": group_of(first),
                "question": first.question.text,
                "gold": first.question.answer,
                "a": {"score": scores[0], "answer": first.result.conclusion, "text": first.result.text},
                "b": {"score": scores[1], "answer": second.result.conclusion, "text": second.result.text},
            })  # fmt: skip
    return flips


def _by_id(scored: Iterable[Scored]) -> dict[str, list[Scored]]:
    found: dict[str, list[Scored]] = defaultdict(list)
    for each in sorted(scored, key=lambda each: each.result.repeat):
        found[each.question.id].append(each)
    return found
