"""What the KV canary costs: the same searches with the canary and without it, in turns.

``python benchmarks/bench_canary.py`` asks questions of the tiny model in groups of 1, 8 and 64, with greedy decoding,
best of 4 and SWIRES. A turn is one group with the canary and one without, in an order that alternates. The figure is
the median of the ratios of the turns, because both halves of a turn meet the same machine. On the CPU the seconds are
those that the process has computed for, on one thread, so that a busy machine matters less. On a GPU they are those of
the wall clock. The canary's work hardly depends on the model, so a model with such short steps is the worst case.

The answers of both are compared. The exit code is 1 if the canary costs more than 10 % in one of the rows.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from bench_batch import SEARCHES, ask
from bench_search import environment
from timing import Results, check_device, synchronize

from llava_cot import EngineConfig, SwiresGenerator
from llava_cot.data import shapes

GROUPS = (1, 8, 64)
MOST = 1.1  # the time with the canary over that without
CLOCKS = {"cpu": time.process_time, "cuda": time.perf_counter}


def turn(generators: dict[str, SwiresGenerator], samples: list[Any], search: Any, device: torch.device) -> dict:
    """Return the seconds of each generator."""
    seconds, answers, clock = {}, [], CLOCKS[device.type]
    for name, generator in generators.items():
        start = clock()
        answers.append(ask(generator, samples, search))
        synchronize(device)
        seconds[name] = clock() - start
        assert generator.engine.pages_in_use == 0
    first, second = ([answer.tokens for answer in found] for found in answers)
    if first != second:
        raise SystemExit("the canary changes an answer")
    return seconds


def bench(generators: dict[str, SwiresGenerator], name: str, group: int, turns: int, device: torch.device) -> dict:
    samples = [shapes.sample(seed) for seed in range(808_000, 808_000 + group)]
    found = []
    for index in range(turns + 1):  # the first warms
        order = dict(sorted(generators.items(), reverse=bool(index % 2)))
        found.append(turn(order, samples, SEARCHES[name], device))
    ratios = [seconds["on"] / seconds["off"] for seconds in found[1:]]
    row: dict[str, Any] = {"search": name, "group": group, "ratio": statistics.median(ratios), "ratios": ratios}
    row |= {which: statistics.median(seconds[which] for seconds in found[1:]) for which in generators}
    print(
        f"| {name} | {group} | {row['off']:.3f} s | {row['on']:.3f} s | {row['ratio']:.3f}x "
        f"({min(ratios):.3f} to {max(ratios):.3f}) |",
        flush=True,
    )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--groups", type=int, nargs="+", default=GROUPS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="write the figures as JSON")
    args = parser.parse_args()
    check_device(args.device)
    torch.set_num_threads(1)
    device = torch.device(args.device)
    first = SwiresGenerator.from_pretrained("tiny", device=args.device)
    calibrations = [*first.calibrations.values()]
    generators = {
        name: SwiresGenerator(
            first.model, first.processor, calibrations=calibrations, engine=EngineConfig(canary=name == "on")
        )
        for name in ("off", "on")
    }
    print("| search | at once | off | on | on over off, median (least to most) |\n| --- | --- | --- | --- | --- |")
    results = Results(args.json, benchmark="bench_canary", **environment(1, args.device), turns=args.turns)
    rows = list[dict]()
    for group in args.groups:
        for name in SEARCHES:
            rows.append(bench(generators, name, group, args.turns, device))
            results.add(rows[-1])
    if missed := [row for row in rows if row["ratio"] > MOST]:
        for row in missed:
            print(f"target missed by {row['search']}, {row['group']} at once: {row['ratio']:.2f}x")
        raise SystemExit(1)


if __name__ == "__main__":
    main()
