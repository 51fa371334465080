"""Show where the time of a decode step on a CPU goes: ``python benchmarks/bench_step_cpu.py``.

The model is the random Mllama of bench_search.py. A step computes and draws one token for each candidate. Its time is
the median of many steps without a profiler. The parts are torch's profiler's, for the same steps; the host is what they
leave. A step must read every weight of the decoder and the head once. So the products are compared with the bandwidth
of a large copy, whose reads and writes both count.
"""

import argparse
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import torch
from bench_batch import seconds_by_kind
from bench_decode import SAMPLING
from bench_search import build_model, environment
from helpers.random_mllama import random_inputs
from timing import Results, copy_bandwidth
from torch.profiler import ProfilerActivity, profile

from llava_cot.core import Expand
from llava_cot.engine.config import EngineConfig
from llava_cot.engine.engine import Engine
from llava_cot.quantize import decoder_matrices
from llava_cot.search.drive import Drive
from llava_cot_kernels.stage_tags import StageTags

WARM = 3  # steps
PAGE_SIZE, PROMPT_TOKENS, ONE_TILE = 16, 40, 1


def drawing(engine: Engine, inputs: dict[str, torch.Tensor], candidates: int, steps: int) -> Drive:
    """Return a search that draws ``candidates`` texts, prefilled and warm."""
    session = engine.open(inputs)

    def program() -> Any:
        yield [Expand(session.root, tuple(range(candidates)), SAMPLING, WARM + steps, frozenset())]

    drive = Drive(session, program())
    for _ in range(WARM):
        engine.step()
    return drive


def times_of_steps(engine: Engine, drive: Drive, watch: AbstractContextManager) -> list[float]:
    times = []
    with watch:
        while not drive.done:
            start = time.perf_counter()
            engine.step()
            times.append(time.perf_counter() - start)
    if drive.error:
        raise drive.error
    return times[:-1]  # the last one also ends the search


def bench(engine: Engine, weight_bytes: int, candidates: int, steps: int) -> dict[str, Any]:
    """Return the milliseconds of a step and of its parts."""
    inputs = random_inputs(engine._model, length=PROMPT_TOKENS, ratio_id=ONE_TILE, seed=0)
    plain = median(times_of_steps(engine, drawing(engine, inputs, candidates, steps), nullcontext()))
    watched = profile(activities=[ProfilerActivity.CPU])
    count = len(times_of_steps(engine, drawing(engine, inputs, candidates, steps), watched))
    found = {kind: seconds * 1e3 / count for kind, seconds in seconds_by_kind(watched).items()}
    parts = {"products": found.pop("matrix"), **found}
    parts["host"] = plain * 1e3 - sum(parts.values())
    return {"ms": plain * 1e3, "parts_ms": parts, "read_gb_s": weight_bytes / parts["products"] / 1e6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    peak = copy_bandwidth("cpu") / 1e9
    settings = {"steps": args.steps, "copy_gb_s": peak, **environment(args.threads, "cpu")}
    results = Results(args.json, benchmark="bench_step_cpu", **settings)
    print(f"{settings['machine']}; a copy moves {peak:.1f} GB/s")
    columns = [
        "dtype",
        "candidates",
        "ms a step",
        "products",
        "weights read",
        "attention",
        "drawing",
        "other ops",
        "host",
    ]
    print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    for dtype in args.dtypes:
        model = build_model("cpu").to(getattr(torch, dtype))
        read = sum(module.weight.nbytes for module in (*decoder_matrices(model).values(), model.lm_head))
        engine = Engine(
            model, StageTags([b"a", b"</x>"], ["</x>"]), config=EngineConfig(PAGE_SIZE, 400, draft_tokens=0)
        )
        for candidates in args.candidates:
            row = {"dtype": dtype, "candidates": candidates, **bench(engine, read, candidates, args.steps)}
            results.add(row)
            products, *others = (f"{ms:.1f}" for ms in row["parts_ms"].values())
            rate = f"{row['read_gb_s']:.1f} GB/s, {row['read_gb_s'] / peak:.0%} of a copy"
            cells = [dtype, candidates, f"{row['ms']:.1f}", products, rate, *others]
            print(f"| {' | '.join(map(str, cells))} |", flush=True)


if __name__ == "__main__":
    main()
