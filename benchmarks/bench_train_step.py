"""How fast a training step is: ``python benchmarks/bench_train_step.py`` on a GPU with room for the 11B model.

The trainer's own modules on weights of no meaning and random tokens, images of four 560-pixel tiles: tokens a second,
the share of the GPU's peak, and memory beside what ``llava-cot train --plan`` says. Medians over steps.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from bench_train_memory import build_run, random_batch, train_step
from timing import environment

from llava_cot.train.config import TrainConfig
from llava_cot.train.distributed import process_group
from llava_cot.train.flops import flops_per_batch, peak_flops
from llava_cot.train.memory import simulate_step

ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "configs/llama_3_2_11b_vision"), help="a folder with config.json")
    parser.add_argument("--optimizer", default="adamw_stochastic", help="adamw and adamw8bit keep float32 weights")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--row-tokens", type=int, default=4096)
    parser.add_argument("--images", type=int, default=4, help="of a row")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="write the figures there")
    args = parser.parse_args()
    params = "bfloat16" if args.optimizer == "adamw_stochastic" else "float32"
    config = TrainConfig(
        model=args.model, output=Path("none"), data=Path("none"), device=args.device,
        optimizer={"name": args.optimizer}, precision={"params": params, "reduce": params},
    )  # fmt: skip
    sizes = {"rows": args.rows, "row_tokens": args.row_tokens}
    planned = simulate_step(config, ranks=1, images_per_row=args.images, accumulates=False, **sizes).total
    with process_group(args.device) as device:
        root, optimizer = build_run(config, device)
        batch = random_batch(root.model.config, args.rows, args.row_tokens, args.images).to(device)
        seconds = []
        for _ in range(3 + args.steps):
            began = time.perf_counter()
            train_step(root, optimizer, batch)
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
        tokens = args.rows * args.row_tokens
        flops = flops_per_batch(
            root.model.config,
            num_tokens=tokens,
            num_images=args.rows * args.images,
            num_pairs=tokens * args.row_tokens // args.images,
        )
        median, peak = statistics.median(seconds[3:]), peak_flops(device)
        found = {
            "machine": environment(args.device),
            "settings": vars(args) | {"json": None},
            "seconds": seconds[3:],
            "tokens_per_s": tokens / median,
            "mfu": flops / median / peak if peak else None,
            "max_memory_allocated": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
            "planned": planned,
        }
    print(json.dumps(found, indent=1))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
