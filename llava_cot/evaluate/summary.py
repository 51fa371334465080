"""The summary of a run: everything that ``summary.json`` says, and the reports show."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llava_cot.evaluate.benchmark import Benchmark
from llava_cot.evaluate.metrics import (
    Estimate,
    by_group,
    group_sums,
    headline,
    measure,
    measure_majority_at_k,
    measure_pass_at_k,
)
from llava_cot.evaluate.pages.markdown import percent, span
from llava_cot.evaluate.result import Result, Scored
from llava_cot.stages import Outcome

USAGE = ("generated_tokens", "generations", "prompt_tokens", "scorer_calls", "retraces", "seconds")
OUTCOMES = (*(outcome.value for outcome in Outcome), "failed")


def summarise(benchmark: Benchmark, scored: Sequence[Scored], protocol: Mapping[str, Any]) -> dict[str, Any]:
    """Return the summary of a run as a mapping that JSON can hold.

    ``accuracy`` is the benchmark's headline as a fraction, with its 95 % ``interval``. An answer that could not be
    parsed, judged or given counts as not right there. ``bounds`` has that accuracy and the one if all such answers were
    right. ``n`` and ``correct`` count what the headline counts, such as the circular groups of MMBench; for a headline
    that is made of other metrics they count questions. With repeats, ``correct`` is the mean over them.

    ``unparsed`` counts results of which the rules can't tell whether they are right, ``ungraded`` those that no judge
    has graded, and ``failed`` those without an answer. ``outcomes`` counts how conclusions were written, and ``rules``
    which rule found each verdict. ``metrics`` and ``categories`` have intervals of their own. ``usage`` has totals and
    means per result. ``pass_at_k`` and ``majority_at_k`` have the powers of 2 up to the number of repeats, and that
    number.

    Args:
        scored: the results of one run with their questions, in any order.
        protocol: what the results depend on, see ``llava_cot.evaluate.folder``. It becomes part of the summary.
    """
    groups = by_group(scored)
    sums = group_sums(benchmark, groups)
    metrics = measure(benchmark, sums)
    main = metrics.get(benchmark.headline, Estimate(None, (0.0, 1.0), 0))
    n, correct = _counts(benchmark, scored, main)
    results = [each.result for each in scored]
    unknown = Counter(_unknown(each) for each in scored)
    repeats = len({result.repeat for result in results})
    ks = _ks(repeats)
    return {
        "benchmark": benchmark.name,
        "title": benchmark.title,
        "headline": benchmark.headline,
        "n": n,
        "correct": correct,
        "accuracy": main.value,
        "interval": list(main.interval),
        "bounds": [main.value, headline(benchmark, scored, unknown=1.0).value],
        "unparsed": unknown["unparsed"],
        "ungraded": unknown["ungraded"],
        "failed": unknown["failed"],
        "results": len(results),
        "metrics": {name: metric.to_dict() for name, metric in metrics.items()},
        "categories": _categories(benchmark, scored),
        "outcomes": {name: sum(result.outcome == name for result in results) for name in OUTCOMES},
        "rules": dict(Counter(result.rule for result in results).most_common()),
        "usage": _usage(results),
        "repeats": repeats,
        "pass_at_k": {str(k): measure_pass_at_k(benchmark, groups, k).to_dict() for k in ks},
        "majority_at_k": {str(k): measure_majority_at_k(benchmark, groups, k).to_dict() for k in ks},
        "protocol": dict(protocol),
    }


def to_text(summary: Mapping[str, Any]) -> str:
    """Return the most important figures of a summary in a few plain lines."""
    low, high = summary["bounds"]
    lines = [
        f"{summary['title']}: {summary['headline']} {percent(summary['accuracy'])} ({span(summary['interval'])}), "
        f"{summary['correct']:,g} of {summary['n']:,} right",
        f"bounds: {percent(low)} if no answer without a verdict was right, {percent(high)} if all were "
        f"({summary['unparsed']:,} unparsed, {summary['ungraded']:,} ungraded, {summary['failed']:,} failed)",
    ]
    others = {name: metric for name, metric in summary["metrics"].items() if name != summary["headline"]}
    lines += [f"{name}: {percent(metric['value'])} ({span(metric['interval'])})" for name, metric in others.items()]
    if costs := summary["usage"].get("generated_tokens"):
        lines.append(f"generated tokens per answer: {costs['mean']:,.1f}")
    return "\n".join(lines)


def _counts(benchmark: Benchmark, scored: Sequence[Scored], main: Estimate) -> tuple[float, float]:
    if main.n is None:  # it is made of other metrics
        ids = {each.question.id for each in scored}
        repeats = Counter(each.question.id for each in scored)
        return len(ids), _rounded(sum(1 / repeats[s.question.id] for s in scored if s.result.correct))
    return _rounded(main.n), _rounded((main.value or 0.0) * main.n)


def _unknown(scored: Scored) -> str | None:
    """Why a result has no score; None if it has one."""
    if scored.result.outcome == "failed":
        return "failed"
    if scored.result.score is not None:
        return None
    return "ungraded" if scored.question.kind == "graded" else "unparsed"


def _categories(benchmark: Benchmark, scored: Iterable[Scored]) -> list[dict[str, Any]]:
    """Return the headline of each category and of each part of it, sorted by name."""
    found: dict[tuple[str, ...], list[Scored]] = defaultdict(list)
    for each in scored:
        for depth in range(1, len(each.question.category) + 1):
            found[each.question.category[:depth]].append(each)
    rows = []
    for category, some in sorted(found.items()):
        metric = headline(benchmark, some)
        n, correct = _counts(benchmark, some, metric)
        value = {"n": n, "correct": correct, "accuracy": metric.value, "interval": list(metric.interval)}
        rows.append({"category": list(category), **value})
    return rows


def _usage(results: Sequence[Result]) -> dict[str, dict[str, float]]:
    """Return the total and the mean of each cost over the results that have it."""
    found = {}
    for name in USAGE:
        values = [result.usage[name] for result in results if name in result.usage]
        if values:
            found[name] = {"total": _rounded(sum(values)), "mean": sum(values) / len(values)}
    return found


def _ks(repeats: int) -> list[int]:
    powers = (2**exponent for exponent in range(repeats.bit_length()))
    return sorted({*powers, repeats}) if repeats > 1 else []


def _rounded(number: float) -> float:
    return round(number) if abs(number - round(number)) < 1e-9 else round(number, 6)
