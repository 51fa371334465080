"""Search with drafts and without: the tokens are the same, in fewer forward passes.

``python benchmarks/bench_drafts.py`` asks questions of the shapes world with every search that samples, with drafts and
without them. Every candidate of every question is compared. A wider pass rounds otherwise, so a draw that falls
between two tokens may differ; such a question is excused if the log-probs up to there agree, and counted.

The first table asks many questions at once and only compares. The second asks one at a time, the two engines in turns,
and has the passes and rows of one question and the wall time. A row is a token that is computed after the prompt.
"Accepted" is how many tokens a candidate drew in a pass that held a draft for it, beyond the first.
"""

import argparse
import time
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from statistics import median
from typing import Any

import torch
from bench_batch import ask
from bench_search import environment
from timing import Results

from llava_cot import (
    BestOfNConfig,
    EngineConfig,
    MajorityConfig,
    SampleConfig,
    SentenceBeamConfig,
    StageBeamConfig,
    SwiresConfig,
    SwiresGenerator,
)
from llava_cot.answer import Answer
from llava_cot.data import shapes

FIRST_SEED = 808_000
AT_ONCE = 25
ROUNDING = 1e-3  # nats, of a log-prob in a wider pass
LIMITS = {"max_new_tokens": 160}
SEARCHES: dict[str, Any] = {
    "sample": SampleConfig(num_return_sequences=4, **LIMITS),
    "best of 4": BestOfNConfig(n=4, **LIMITS),
    "majority of 4": MajorityConfig(n=4, **LIMITS),
    "sentence beam": SentenceBeamConfig(**LIMITS),
    "stage beam": StageBeamConfig(**LIMITS),
    "SWIRES, published": SwiresConfig.published(**LIMITS),
    "SWIRES, published, cutoff at 95 %": SwiresConfig.published(cutoff_quantile=0.95, **LIMITS),
    "SWIRES, released": SwiresConfig.released(**LIMITS),
}


@dataclass(frozen=True)
class Cost:
    """Means over questions of what a search cost, and the seconds that all took together."""

    passes: float
    rows: float
    drawn: float
    drafted: float
    accepted: float
    shared: float
    seconds: float

    @classmethod
    def of(cls, answers: list[Answer], seconds: float) -> "Cost":
        names = ("steps", "decoded_tokens", "generated_tokens", "drafted_tokens", "accepted_tokens", "shared_tokens")
        return cls(*(sum(getattr(a.usage, name) for a in answers) / len(answers) for name in names), seconds)


def compare(plain: Answer, drafted: Answer) -> str:
    """Return "equal", "rounding" if the first token that differs was as likely to both, or "different"."""
    for one, other in zip_longest(plain.trace.data["nodes"], drafted.trace.data["nodes"]):
        if one is None or other is None:
            return "different"
        if one["tokens"] == other["tokens"] and one["kept"] == other["kept"]:
            continue
        pairs = list(zip(one["tokens"], other["tokens"], one["entropies"], other["entropies"]))
        differs = next((at for at, (a, b, *_) in enumerate(pairs) if a != b), len(pairs) - 1)
        # The entropies at a place are those of the distributions that the two tokens were drawn from.
        is_close = all(abs(a - b) < ROUNDING for *_, a, b in pairs[: differs + 1])
        return "rounding" if is_close else "different"
    return "equal"


def compare_all(engines: list[SwiresGenerator], name: str, count: int) -> dict[str, Any]:
    found = dict.fromkeys(("equal", "rounding", "different"), 0)
    for start in range(0, count, AT_ONCE):
        samples = [shapes.sample(FIRST_SEED + index) for index in range(start, min(count, start + AT_ONCE))]
        plain, drafted = (ask(generator, samples, SEARCHES[name], start) for generator in engines)
        for one, other in zip(plain, drafted, strict=True):
            found[compare(one, other)] += 1
    return {"search": name, "questions": count, **found}


def time_one_by_one(engines: list[SwiresGenerator], name: str, count: int, turns: int) -> dict[str, Any]:
    samples = [shapes.sample(FIRST_SEED + index) for index in range(count)]
    answers, seconds = [list[Answer](), list[Answer]()], [list[float](), list[float]()]
    for _ in range(turns):
        for at, generator in enumerate(engines):
            start = time.perf_counter()
            answers[at] = [ask(generator, [sample], SEARCHES[name])[0] for sample in samples]
            seconds[at].append(time.perf_counter() - start)
    plain, drafted = (Cost.of(*of_engine) for of_engine in zip(answers, map(median, seconds)))
    return {"search": name, "questions": count, "plain": asdict(plain), "drafted": asdict(drafted)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["tiny", "tiny-qwen"])
    parser.add_argument("--searches", nargs="+", default=list(SEARCHES), choices=SEARCHES)
    parser.add_argument("--questions", type=int, default=300, help="compared, many at once")
    parser.add_argument("--timed", type=int, default=32, help="questions that are asked one at a time")
    parser.add_argument("--turns", type=int, default=3, help="of which the median counts")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the figures as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = Results(args.json, benchmark="bench_drafts", **environment(args.threads, "cpu"), **LIMITS)
    differing = 0
    for model in args.models:
        engines = [SwiresGenerator.from_pretrained(model, engine=EngineConfig(draft_tokens=n)) for n in (0, None)]
        for generator in engines:
            ask(generator, [shapes.sample(0)], "greedy")  # warm
        print(f"\n{model}\n\n| search | equal | excused as rounding | different |\n{'| --- ' * 4}|")
        for name in args.searches:
            row = compare_all(engines, name, args.questions)
            results.add({"model": model, **row})
            differing += row["different"]
            print(f"| {name} | {row['equal']} | {row['rounding']} | {row['different']} |", flush=True)
        columns = ("search", "passes", "rows", "drafted", "accepted", "shared", "time with drafts")
        print(f"\n| {' | '.join(columns)} |\n{'| --- ' * len(columns)}|")
        for name in args.searches:
            row = time_one_by_one(engines, name, args.timed, args.turns)
            results.add({"model": model, **row})
            print(_line(row), flush=True)
    if differing:
        raise SystemExit(f"{differing} questions differ by more than rounding")


def _line(row: dict[str, Any]) -> str:
    one, other = Cost(**row["plain"]), Cost(**row["drafted"])
    return (
        f"| {row['search']} | {one.passes:.0f} to {other.passes:.0f} | {one.rows:.0f} to {other.rows:.0f} | "
        f"{other.drafted:.0f} | {other.accepted:.0f} | {other.shared:.0f} | {other.seconds / one.seconds:.2f}x |"
    )


if __name__ == "__main__":
    main()
