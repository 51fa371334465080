"""Measure the least that a decode step can cost on this GPU: ``python benchmarks/bench_floor.py``.

It measures in CUDA graphs: the copy bandwidth, the time of a graph node that does almost nothing, and the matrix
products of the 11B model's layers at 1 to 64 rows, on weights that are in no cache. ``step_model.py --floor`` adds them
up.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median

import torch
from timing import Results, check_device, copy_bandwidth, environment
from torch.nn.functional import linear

from llava_cot.engine.graphs import CudaRecorder

SHAPES = {  # (output features, input features); two names mean a fused product
    "q,o": (4096, 4096), "k,v": (1024, 4096), "qkv": (6144, 4096), "gate,up": (14336, 4096),
    "gate_up": (28672, 4096), "down": (4096, 14336), "head": (128256, 4096),
}  # fmt: skip
ROWS = (1, 4, 8, 16, 32, 64)
WEIGHT_BYTES = 3 << 30  # weights of one shape, enough that none is still in L2 when it is used again
NUM_TINY = 1000


def microseconds(recorder: CudaRecorder, step: Callable[[], object], repeats: int = 5) -> float:
    """Return the median time of a graph of ``step``."""
    replay = recorder.capture(step)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(1 + repeats):
        start.record()
        replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return median(times[1:])


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--device", choices=("cuda",), default="cuda")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    check_device(args.device)
    recorder = CudaRecorder(torch.device("cuda", 0))
    copy_tb_s = copy_bandwidth("cuda") / 1e12
    x = torch.ones(4096, device="cuda", dtype=torch.bfloat16)
    node_us = microseconds(recorder, lambda: [x.mul_(1.0) for _ in range(NUM_TINY)]) / NUM_TINY
    print(f"{environment('cuda')}; copy {copy_tb_s:.2f} TB/s; a tiny kernel in a graph {node_us:.2f} us", flush=True)
    results = Results(
        args.json, device=torch.cuda.get_device_name(), machine=environment("cuda"), copy_tb_s=copy_tb_s,
        graph_node_us=node_us,
    )  # fmt: skip
    print(f"| matrices | shape | {' | '.join(f'M={m}' for m in args.rows)} |\n|{' --- |' * (2 + len(args.rows))}")
    for name, (n, k) in SHAPES.items():
        cells = []
        for m, us in products(recorder, n, k, args.rows):
            tb_s = 2 * (n * k + m * (n + k)) / us / 1e6
            results.add({"name": name, "n": n, "k": k, "m": m, "us": us, "tb_s": tb_s})
            cells.append(f"{us:.1f} us, {tb_s / copy_tb_s:.0%}")
        print(f"| {name} | {n} x {k} | {' | '.join(cells)} |", flush=True)


def products(recorder: CudaRecorder, n: int, k: int, num_rows: Sequence[int]) -> Iterator[tuple[int, float]]:
    """Return (M, microseconds) of one product of [M, K] with a weight [N, K]."""
    count = max(2, min(64, WEIGHT_BYTES // (2 * n * k)))
    weights = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(count)]
    for m in num_rows:
        rows = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        step = partial(_multiply, rows, weights)
        yield m, microseconds(recorder, step) / count


def _multiply(rows: torch.Tensor, weights: list[torch.Tensor]) -> None:
    for weight in weights:
        linear(rows, weight)


if __name__ == "__main__":
    main()
