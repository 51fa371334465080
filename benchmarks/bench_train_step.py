"""Measure how fast a training step is: ``python benchmarks/bench_train_step.py`` on a GPU.

It runs the trainer's own modules with random weights, random tokens and images of four 560-pixel tiles. It reports
tokens a second, the share of the GPU's peak, and the memory beside the prediction of ``llava-cot train --plan``.
Figures are medians over steps.

The model is the 11B one if it fits. Otherwise it has as many of its text layers as fit. With the default optimizer
these are all 40 in 141 GB, and 25 or 30 in 80 GB.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_train_memory import available_bytes, build_run, random_batch, train_step
from timing import Results, check_device, environment, synchronize
from transformers import AutoConfig

from llava_cot.families import training_of
from llava_cot.train.config import TrainConfig
from llava_cot.train.distributed import process_group
from llava_cot.train.flops import peak_flops
from llava_cot.train.memory import simulate_step

ROOT = Path(__file__).parents[1]
UNIT = 5  # text layers, one of which attends to the image; layers are left out in multiples of it
SHARE = 0.9  # share of the free memory that a plan may use
WARMUP = 3
GIB = 2**30


def write_model(model: str, layers: int, folder: Path) -> str:
    """Write the ``config.json`` of ``model`` with only its first ``layers`` text layers to a folder."""
    settings = AutoConfig.from_pretrained(model)
    text = settings.text_config
    text.num_hidden_layers = layers
    text.cross_attention_layers = [index for index in text.cross_attention_layers if index < layers]
    path = folder / str(layers)
    settings.save_pretrained(path)
    return str(path)


def choose_layers(total: int, plan: Callable[[int], int], free: int) -> tuple[int, int]:
    """Return how many of ``total`` text layers fit in ``free`` bytes, at least ``UNIT``, and their planned bytes.

    A plan takes a second for each layer, and each layer adds the same bytes. So two small plans predict the others.
    """
    if total <= 2 * UNIT:
        return total, plan(total)
    least, more = plan(UNIT), plan(2 * UNIT)
    units = max(1, 1 + int((SHARE * free - least) // (more - least)))
    layers = min(total, units * UNIT)
    return layers, least + (more - least) * (layers - UNIT) // UNIT


def free_bytes(device: str) -> int:
    return torch.cuda.mem_get_info()[0] if device == "cuda" else available_bytes()


def measure(config: TrainConfig, args: argparse.Namespace) -> dict[str, Any]:
    with process_group(args.device) as device:
        root, optimizer = build_run(config, device)
        batch = random_batch(root.model.config, args.rows, args.row_tokens, args.images).to(device)
        seconds = []
        for _ in range(WARMUP + args.steps):
            began = time.perf_counter()
            train_step(root, optimizer, batch)
            synchronize(device)
            seconds.append(time.perf_counter() - began)
        tokens = args.rows * args.row_tokens
        flops = training_of(root.model.config).flops(
            num_tokens=tokens,
            num_pairs=batch.num_pairs,
            **training_of(root.model.config).count_images(batch.inputs),
        )
        median, peak = statistics.median(seconds[WARMUP:]), peak_flops(device)
        return {
            "first_seconds": seconds[0],
            "seconds": seconds[WARMUP:],
            "tokens_per_s": tokens / median,
            "mfu": flops / median / peak if peak else None,
            "max_memory_allocated": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "configs/llama_3_2_11b_vision"), help="a folder with config.json")
    parser.add_argument("--layers", type=int, help="text layers to use; default: as many as fit")
    parser.add_argument("--optimizer", default="adamw_stochastic", help="adamw and adamw8bit keep float32 weights")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--row-tokens", type=int, default=4096)
    parser.add_argument("--images", type=int, default=4, help="images per row")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    check_device(args.device)
    params = "bfloat16" if args.optimizer == "adamw_stochastic" else "float32"
    sizes = {"rows": args.rows, "row_tokens": args.row_tokens, "images_per_row": args.images}
    total, free = AutoConfig.from_pretrained(args.model).text_config.num_hidden_layers, free_bytes(args.device)
    results = Results(args.json, machine=environment(args.device), settings=vars(args))
    with tempfile.TemporaryDirectory() as folder:

        def config(layers: int) -> TrainConfig:
            return TrainConfig(
                model=write_model(args.model, layers, Path(folder)), output=Path("none"), data=Path("none"),
                device=args.device, optimizer={"name": args.optimizer}, precision={"params": params, "reduce": params},
            )  # fmt: skip

        def plan(layers: int) -> int:
            return simulate_step(config(layers), ranks=1, accumulates=False, **sizes).total

        layers, planned = (args.layers, plan(args.layers)) if args.layers else choose_layers(total, plan, free)
        row: dict[str, Any] = {"text_layers": layers, "planned": planned, "free": free}
        print(f"{layers} of {total} text layers, planned {planned / GIB:.1f} of {free / GIB:.1f} GiB", flush=True)
        if planned > free:
            sys.exit("the layers do not fit in the free memory: choose fewer --layers, --row-tokens or --images")
        try:
            row |= measure(config(layers), args)
        except torch.OutOfMemoryError as error:
            row["error"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    results.add(row)
    if "error" in row:
        sys.exit(row["error"])
    mfu = f", {row['mfu']:.1%} of the peak" if row["mfu"] else ""
    held = f", {row['max_memory_allocated'] / GIB:.1f} GiB allocated" if row["max_memory_allocated"] else ""
    print(f"{row['tokens_per_s']:.0f} tokens/s, {statistics.median(row['seconds']):.2f} s a step{mfu}{held}")


if __name__ == "__main__":
    main()
