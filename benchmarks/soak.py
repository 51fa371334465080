"""Ask the tiny model for thousands of answers on one engine, and watch what the process holds.

``python benchmarks/soak.py`` asks 10,000 questions in groups, greedily and by short searches in turn. The pages are too
few for a group of searches, so that some are preempted, and every tenth search is cancelled. After every 500 answers no
page, image or session may be held, and the resident memory is read. It may grow by 2 % at most: the median of the last
third of the readings after the warm-up (the first quarter of the answers) is compared with that of the first third.
"""

import argparse
import gc
import sys
import time
import weakref
from pathlib import Path

import torch
from bench_search import environment
from timing import MAX_GROWTH, Results, growth, memory_bytes

from llava_cot import BestOfNConfig, EngineConfig, GreedyConfig, SwiresConfig, SwiresGenerator, TokenBeamConfig
from llava_cot.data import shapes
from llava_cot.search.run import SearchRun
from llava_cot.searcher import cancel_all

GROUP, EVERY = 50, 500  # answers
QUESTIONS = 200  # that differ
NUM_PAGES = 280  # of 4 tokens; a group would use about 400
SEARCHES = (
    GreedyConfig(max_new_tokens=12),
    BestOfNConfig(n=3, max_new_tokens=10),
    SwiresConfig.published(max_new_tokens=16, max_stage_tokens=dict.fromkeys(("SUMMARY", "CAPTION"), 5), cutoff=0.0),
    TokenBeamConfig(num_beams=2, max_new_tokens=8),
)


def answer_group(generator: SwiresGenerator, first: int) -> tuple[list[weakref.ref], int]:
    """Answer the questions from number ``first`` on, all at once.

    Returns references to their sessions, and how many of them computed tokens again.
    """
    runs: list[SearchRun] = []
    try:
        for number in range(first, first + GROUP):
            sample = shapes.sample(800_000 + number % QUESTIONS)
            plan = generator.plan(SEARCHES[number % len(SEARCHES)])
            runs.append(generator.submit(sample.image, sample.question, plan, seed=number))
        for _ in range(3):
            generator.engine.step()
        cancelled = runs[9::10]
        cancel_all(cancelled)
        rest = [run for run in runs if run not in cancelled]
        generator.wait(rest)
        for run in rest:
            generator.answer_of(run)  # its trace too
        again = sum(run.search.usage.recomputed_tokens > 0 for run in runs)
        return [weakref.ref(run.search.session) for run in runs], again
    finally:
        cancel_all(runs)


def held(generator: SwiresGenerator, sessions: list[weakref.ref]) -> dict[str, int]:
    """What is held after all answers: each number must be 0."""
    gc.collect()
    engine = generator.engine
    return {
        "pages": engine.pages_in_use,
        "sequences": engine.pool.num_sequences,
        "images": engine.images_in_use,
        "jobs": len(engine.schedule.jobs),
        "sessions": sum(session() is not None for session in sessions),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, default=10_000, help="a multiple of the readings' distance")
    parser.add_argument("--every", type=int, default=EVERY, help=f"answers between two readings, a multiple of {GROUP}")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    generator = SwiresGenerator.from_pretrained("tiny", engine=EngineConfig(page_size=4, num_pages=NUM_PAGES))
    results = Results(args.json, **environment(args.threads, "cpu"), answers=args.answers, max_growth=MAX_GROWTH)
    print("| answers | resident MiB | searches that computed again | seconds |\n| --- | --- | --- | --- |")
    start, sizes, again = time.perf_counter(), list[int](), 0
    for done in range(args.every, args.answers + 1, args.every):
        groups = range(done - args.every, done, GROUP)
        found = [answer_group(generator, first) for first in groups]
        sessions = [session for group, _ in found for session in group]
        again += sum(count for _, count in found)
        if any((left := held(generator, sessions)).values()):
            sys.exit(f"after {done} answers something is held: {left}")
        sizes.append(memory_bytes("VmRSS"))
        seconds = time.perf_counter() - start
        results.add({"answers": done, "resident_bytes": sizes[-1], "seconds": seconds, "computed_again": again})
        print(f"| {done} | {sizes[-1] / 2**20:.1f} | {again} | {seconds:.0f} |", flush=True)
    grown = growth(sizes)
    print(f"resident memory grew by {grown:.2%} after the first quarter of the answers")
    if grown > MAX_GROWTH:
        sys.exit(f"resident memory may grow by {MAX_GROWTH:.0%}, and grew by {grown:.2%}")


if __name__ == "__main__":
    main()
