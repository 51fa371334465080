"""Ask many questions at once on the tiny model: the answers are the same, in fewer forward steps and less time.

``python benchmarks/bench_batch.py --threads 1`` asks 64 questions in groups of 1, 8 and 64, in one process and on one
engine. Ratios are against the groups of 1. The answers are compared token for token before anything is printed. A
forward step is one pass of the model over all active branches, and a row is one token of such a pass. Prefills, one for
each question, are not counted. Nothing is drafted, since a question that runs alone gets more drafts than one of many,
and so takes fewer steps. SWIRES is also run with drafts, for comparison.

The shares are parts of the time of a step: matrix products (by torch's profiler), our attention, our sampler and the
other ops. The rest is the host's: transformers' modules and the engine. Ops this small look longer while they are
profiled, so the host's share is an underestimate.

The last table is SWIRES on all questions at once with fewer pages than it would use. It shows the tokens that are
recomputed because their pages were evicted, and the time relative to that with enough pages. The answers are the same.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from bench_search import environment
from timing import Results
from torch.profiler import ProfilerActivity, profile

from llava_cot import BestOfNConfig, EngineConfig, GreedyConfig, SwiresConfig, SwiresGenerator
from llava_cot.answer import Answer
from llava_cot.data import shapes

GROUPS = (1, 8, 64)
MAX_NEW_TOKENS = 160
SEARCHES = {
    "greedy": GreedyConfig(max_new_tokens=MAX_NEW_TOKENS),
    "swires (published)": SwiresConfig.published(max_new_tokens=MAX_NEW_TOKENS),
    "best of 4": BestOfNConfig(n=4, max_new_tokens=MAX_NEW_TOKENS),
}
WITH_DRAFTS = "swires (published)"
MATRIX_OPS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "llava_cot_kernels::few_row_linear"}
OWN_OPS = {
    "llava_cot_kernels::paged_attention": "attention",
    "llava_cot_kernels::shared_attention": "attention",
    "llava_cot_kernels::sample": "drawing",
}
# Requirements for the largest group
MOST_STEPS, LEAST_SPEEDUP = 1.5, 2.0


@dataclass(frozen=True)
class Figures:
    """The figures of all questions, asked ``group`` at a time."""

    search: str
    group: int
    seconds: float
    tokens_per_second: float  # drawn, including tokens of candidates that were not kept
    forward_steps: int
    rows: int  # tokens of all forward steps
    longest: int  # forward steps of the longest search of each group, summed over groups
    speedup: float  # over one at a time
    shares: dict[str, float]  # shares of the time of a step, in the last group

    @property
    def steps_ratio(self) -> float:
        return self.forward_steps / self.longest


@contextmanager
def counted_steps(generator: SwiresGenerator):
    """Yield a list that gets one entry for every forward step."""
    view, steps = generator.engine.view, list[int]()
    decode = view.decode

    def counting(token_ids, *args, **kwargs):
        steps.append(len(token_ids))
        return decode(token_ids, *args, **kwargs)

    view.decode = counting  # type: ignore[method-assign]
    try:
        yield steps
    finally:
        del view.decode


def ask(
    generator: SwiresGenerator, samples: Sequence[Any], search: Any, seed: int = 0, **settings: Any
) -> list[Answer]:
    images, questions = [sample.image for sample in samples], [sample.question for sample in samples]
    return generator.answer_batch(images, questions, search, seed=seed, **settings)


def seconds_by_kind(watched: profile) -> dict[str, float]:
    """Return the seconds of what was profiled: of matrix products, of our ops, and of other ops."""
    seconds = dict.fromkeys(("matrix", *OWN_OPS.values(), "other_ops"), 0.0)
    for event in watched.key_averages():
        kind = "matrix" if event.key in MATRIX_OPS else OWN_OPS.get(event.key, "other_ops")
        seconds[kind] += event.self_cpu_time_total / 1e6
    return seconds


def shares_of_steps(generator: SwiresGenerator, samples: Sequence[Any], search: Any) -> dict[str, float]:
    """Return the shares of a step's time for one group, without prefills and preprocessing; "host" is the rest."""

    def run_steps(watch: AbstractContextManager) -> float:
        plan = generator.plan(search)
        runs = [generator.submit(sample.image, sample.question, plan) for sample in samples]
        generator.engine.step()  # prefills all
        with watch:
            start = time.perf_counter()
            generator.wait(runs)
            return time.perf_counter() - start

    # The profiler slows down what it watches, so its seconds are compared with those of a run without it.
    plain = min(run_steps(nullcontext()) for _ in range(2))
    watched = profile(activities=[ProfilerActivity.CPU])
    run_steps(watched)
    shares = {kind: seconds / plain for kind, seconds in seconds_by_kind(watched).items()}
    return {**shares, "host": 1 - sum(shares.values())}


def bench(generator: SwiresGenerator, name: str, samples: Sequence[Any], label: str = "") -> Iterator[Figures]:
    search, alone, alone_seconds = SEARCHES[name], list[Answer](), 0.0
    for group in [group for group in GROUPS if group <= len(samples)]:
        groups = [samples[start : start + group] for start in range(0, len(samples), group)]
        with counted_steps(generator) as steps:
            start = time.perf_counter()
            answers = [answer for some in groups for answer in ask(generator, some, search)]
            seconds = time.perf_counter() - start
        assert generator.engine.pages_in_use == 0
        if not alone:
            alone, alone_seconds = answers, seconds
        for index, (answer, single) in enumerate(zip(answers, alone)):
            if answer.tokens != single.tokens or _drawn(answer) != _drawn(single):
                raise SystemExit(f"{name}, {group} at once: question {index} has another answer than alone")
        longest = [max(a.usage.steps for a in alone[at : at + group]) for at in range(0, len(samples), group)]
        shares = shares_of_steps(generator, groups[-1], search)
        tokens = sum(answer.usage.generated_tokens for answer in answers)
        speedup = alone_seconds / seconds
        counts = (len(steps), sum(steps), sum(longest))
        row = Figures(label or name, group, seconds, tokens / seconds, *counts, speedup, shares)
        print(_row(row), flush=True)
        yield row


def bench_pressure(generator: SwiresGenerator, samples: Sequence[Any]) -> Iterator[dict[str, Any]]:
    name, expected, first = "swires (published)", list[Answer](), dict[str, Any]()
    search = SEARCHES[name]
    for share in (1.0, 0.5, 0.25, 0.1):
        pages = int(share * first["pages"]) if first else None
        calibrations = [*generator.calibrations.values()]
        engine = EngineConfig(num_pages=pages, draft_tokens=0)
        tight = SwiresGenerator(generator.model, generator.processor, calibrations=calibrations, engine=engine)
        ask(tight, samples[:2], "greedy")  # warm
        tight.engine.runner.peak_pages = 0
        start = time.perf_counter()
        answers = ask(tight, samples, search)
        seconds = time.perf_counter() - start
        expected = expected or answers
        if [answer.tokens for answer in answers] != [answer.tokens for answer in expected]:
            raise SystemExit(f"{pages} pages give other answers")
        drawn, again = (
            sum(getattr(answer.usage, name) for answer in answers) for name in ("generated_tokens", "recomputed_tokens")
        )
        row: dict[str, Any] = {
            "share_of_pages": share,
            "search": name,
            "pages": tight.engine.runner.peak_pages,
            "seconds": seconds,
        }
        row |= {"generated_tokens": drawn, "recomputed_tokens": again}
        first = first or row
        ratio = seconds / first["seconds"]
        print(f"| {row['pages']} ({share:.0%}) | {seconds:.2f} s ({ratio:.2f}x) | {drawn} | {again} |", flush=True)
        yield row


def _drawn(answer: Answer) -> list[list[int]]:
    return [node["tokens"] for node in answer.trace.data["nodes"]]


def _row(row: Figures) -> str:
    shares = " | ".join(f"{share:.0%}" for share in row.shares.values())
    return (
        f"| {row.search} | {row.group} | {row.seconds:.2f} s | {row.speedup:.2f}x | {row.tokens_per_second:.0f} | "
        f"{row.forward_steps} ({row.steps_ratio:.2f}x) | {row.rows} | {shares} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the figures as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    generator = SwiresGenerator.from_pretrained("tiny", engine=EngineConfig(draft_tokens=0))
    samples = [shapes.sample(seed) for seed in range(807_000, 807_000 + args.questions)]
    ask(generator, samples[:2], "greedy")  # warm
    columns = ["search", "at once", "wall time", "speed-up", "tokens/s", "forward steps (over the longest alone's)"]
    columns += ["rows", "matrix work", "attention", "drawing", "other ops", "host"]
    print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    results = Results(
        args.json,
        benchmark="bench_batch",
        **environment(args.threads, "cpu"),
        questions=args.questions,
        max_new_tokens=MAX_NEW_TOKENS,
    )
    rows = list[Figures]()
    drafting = SwiresGenerator.from_pretrained("tiny")
    ask(drafting, samples[:2], "greedy")  # warm
    runs = [bench(generator, name, samples) for name in SEARCHES]
    runs.append(bench(drafting, WITH_DRAFTS, samples, f"{WITH_DRAFTS}, drafts"))
    for row in (row for run in runs for row in run):
        rows.append(row)
        results.add({**asdict(row), "steps_ratio": row.steps_ratio})
    print("\n| pages | wall time | tokens drawn | tokens recomputed |\n| --- | --- | --- | --- |")
    for pressed in bench_pressure(generator, samples):
        results.add(pressed)
    largest = max(row.group for row in rows)
    missed = [row for row in rows if row.group == largest and row.search in SEARCHES and not _is_enough(row)]
    for row in missed:
        print(f"target missed by {row.search}: {row.speedup:.2f}x the speed, {row.steps_ratio:.2f}x the steps")
    if missed:
        raise SystemExit(1)


def _is_enough(row: Figures) -> bool:
    return row.speedup >= LEAST_SPEEDUP and row.steps_ratio <= MOST_STEPS


if __name__ == "__main__":
    main()
