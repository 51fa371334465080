"""Measure memory and decode steps of quantised weights: ``python benchmarks/bench_quantize.py``.

The model is the random Mllama of bench_search.py, of 109M parameters, of which 56M are in decoder layers. A row is
from two fresh processes that load it from disk, in one dtype and with one way to quantise:

- the bytes of the weights, with their scales;
- the peak of resident memory (on CUDA, of allocated memory) while the engine answers, above that before the model was
  loaded;
- the median milliseconds of a decode step of the engine, by the number of candidates. A step includes the host.

The rows are measured in turn, ``--rounds`` times, and a figure is the median of its rounds.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import timing
import torch
from bench_decode import SAMPLING
from bench_search import build_model
from timing import NEEDS_GPU, Results, check_device, environment, memory_bytes

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from helpers.random_mllama import random_inputs
from transformers import AutoConfig, AutoModelForImageTextToText

from llava_cot.core import Expand
from llava_cot.engine.config import EngineConfig
from llava_cot.engine.engine import Engine
from llava_cot.quantize import check_quantize, loading_settings
from llava_cot.search.drive import Drive
from llava_cot_kernels.stage_tags import StageTags

PLAIN = "none"
CASES = (  # how to quantise, and the dtype of the rest
    (PLAIN, "float32"), (PLAIN, "bfloat16"), ("int8", "float32"), ("int8", "bfloat16"), ("int4", "bfloat16"),
    ("nf4", "float32"), ("nf4", "bfloat16"),
)  # fmt: skip
PROMPT_TOKENS = 40
ONE_TILE = 1
PAGE_SIZE = 16
WARM_STEPS = 2


def measure(folder: str, name: str, dtype: str, device: str, candidates: list[int], steps: int) -> dict[str, Any]:
    """Return the figures of one way, from this process."""
    settings: dict[str, Any] = {"dtype": getattr(torch, dtype), "device_map": {"": device}}
    if name != PLAIN:
        settings = loading_settings(name, AutoConfig.from_pretrained(folder), dtype, device)
    before = memory_bytes("VmRSS")  # after the packages have been imported
    model = AutoModelForImageTextToText.from_pretrained(folder, **settings)
    model.generation_config.eos_token_id = None
    if device == "cpu":
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak to the memory that is resident now
    pages = -(-PROMPT_TOKENS // PAGE_SIZE) + 2 * sum(candidates) * (-(-steps // PAGE_SIZE) + 1)
    config = EngineConfig(PAGE_SIZE, pages, draft_tokens=0)  # or the second turn would draft what the first drew
    engine = Engine(model, StageTags([b"a", b"</x>"], ["</x>"]), config=config)
    inputs = random_inputs(model, length=PROMPT_TOKENS, ratio_id=ONE_TILE, seed=0)
    found = step_ms(engine, inputs, candidates, steps)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else memory_bytes("VmHWM") - before
    return {"weight_bytes": weight_bytes(model), "peak_bytes": peak, "ms": found}


def step_ms(engine: Engine, inputs: dict[str, torch.Tensor], candidates: list[int], steps: int) -> dict[str, float]:
    """Return the median milliseconds of a step with each number of candidates, which one session draws in turn."""
    session, times = engine.open(inputs), dict[str, list[float]]()
    usage, own = session.usage, list[float]()

    def program():
        nonlocal own
        for n in candidates * (2 if engine.view.device.type == "cuda" else 1):  # the first turn captures graphs
            own = times[str(n)] = []
            yield [Expand(session.root, tuple(range(n)), SAMPLING, steps, frozenset())]

    drive = Drive(session, program())
    while not drive.done:
        start, before, measured = time.perf_counter(), usage.steps, own
        engine.step()
        if count := usage.steps - before:
            measured.append((time.perf_counter() - start) / count * 1e3)
    if drive.error:
        raise drive.error
    return {n: median(of_n[WARM_STEPS:]) for n, of_n in times.items()}


def weight_bytes(model: torch.nn.Module) -> int:
    """Return the bytes of all weights, with what a quantised one holds beside its data."""
    tensors, todo = dict[int, torch.Tensor](), [*model.parameters(), *model.buffers()]
    while todo:
        each = todo.pop()
        held = [*vars(each).values()] if hasattr(each, "__dict__") and not isinstance(each, torch.nn.Module) else []
        todo += [value for value in held if isinstance(value, torch.Tensor) or "state" in type(value).__name__.lower()]
        if isinstance(each, torch.Tensor) and not hasattr(each, "qdata"):  # a subclass is counted by its parts
            tensors[each.untyped_storage().data_ptr()] = each
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors.values())


def in_process(folder: str, name: str, dtype: str, device: str, candidates: list[int], steps: int) -> dict[str, Any]:
    """Measure the times and then the peak, each in a fresh process."""

    def run(steps: int, environ: dict[str, str] | None = None) -> dict[str, Any]:
        arguments = (folder, name, dtype, steps, *candidates, "--device", device)
        return json.loads(timing.in_process(__file__, "--one", *map(str, arguments), environ=environ))

    # Every large tensor gets pages of its own, which are returned when it is freed. So resident memory is live memory.
    # That takes time, where a step undoes the quantisation of matrices.
    alive = run(WARM_STEPS + 1, {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"})
    return {**run(steps), "peak_bytes": alive["peak_bytes"]}


def summary(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the median of each figure."""
    ms = {n: median(each["ms"][n] for each in rounds) for n in rounds[0]["ms"]}
    return {key: median(each[key] for each in rounds) for key in ("weight_bytes", "peak_bytes")} | {"ms": ms}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--candidates", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--steps", type=int, default=16, help="decode steps of each run, two of which are not counted")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    check_device(args.device)
    if args.one:
        folder, name, dtype, steps, *candidates = args.one
        print(json.dumps(measure(folder, name, dtype, args.device, [*map(int, candidates)], int(steps))))
        return
    cases = (*CASES, ("float8", "bfloat16")) if args.device == "cuda" else CASES
    for name, dtype in cases:
        if name != PLAIN:
            try:
                check_quantize(name, dtype, args.device)
            except ValueError as error:
                print(f"{Path(sys.argv[0]).name}: {error}")
                sys.exit(NEEDS_GPU)
    settings = {name: getattr(args, name) for name in ("candidates", "steps", "rounds")}
    results = Results(args.json, machine=environment(args.device), settings=settings)
    found: dict[tuple[str, str], list[dict[str, Any]]] = {case: [] for case in cases}
    errors: dict[tuple[str, str], str] = {}
    with tempfile.TemporaryDirectory() as folder:
        build_model(args.device).save_pretrained(folder)
        for _ in range(args.rounds):
            for case in cases:
                try:
                    figures = in_process(folder, *case, args.device, args.candidates, args.steps)
                    found[case].append(figures)
                except RuntimeError as error:
                    errors[case] = str(error)
    print(f"{environment(args.device)}; {args.rounds} rounds")
    print(f"| weights | dtype | MB | peak, MB | {' | '.join(f'ms a step, {n}' for n in args.candidates)} |")
    print("| --- | --- | --- | --- |" + " --- |" * len(args.candidates))
    for case, rounds in found.items():
        row: dict[str, Any] = {"quantize": case[0], "dtype": case[1]}
        if case in errors:
            results.add({**row, "error": errors[case]})
            print(f"| {case[0]} | {case[1]} | {errors[case]} |")
            continue
        row |= summary(rounds)
        results.add(row)
        sizes = [f"{row[key] / 1e6:.0f}" for key in ("weight_bytes", "peak_bytes")]
        print(f"| {' | '.join([*case, *sizes, *(f'{ms:.1f}' for ms in row['ms'].values())])} |", flush=True)
    if errors:
        sys.exit(1)


if __name__ == "__main__":
    main()
