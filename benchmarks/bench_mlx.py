"""Measure decode steps of one candidate, in mlx-vlm and in the engine.

``python benchmarks/bench_mlx.py --mlx-python P`` runs both. ``P`` is the Python of an environment with ``mlx-vlm`` and
``mlx[cpu]``. The model is the random Mllama of bench_search.py, of 109M parameters, and the image has one tile. mlx-vlm
has no ``n``, so there is one candidate. A row is from a fresh process for each round, and its figure is the median of
the rounds' median milliseconds of a step:

- the engine in float32, in bfloat16 and with int8 weights;
- mlx-vlm in float32, and with the weights of its language model in groups of 64 with 4 bits.

The ways take turns. The wheel of ``mlx[cpu]`` brings the reference BLAS, with which a step takes many seconds.
``--mlx-blas`` loads another one in its place, such as ``libmkl_rt.so`` of the package ``mkl``. mlx-vlm stores no keys
and values of the image. It computes them again for every token, for the three padding tiles too, and its decode steps
do not mask those. So its rows have the share of transformers' greedy tokens in float32, up to the first that differs.
For an image of four tiles, which has no padding, they are equal.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch
from bench_quantize import ONE_TILE, PROMPT_TOKENS, WARM_STEPS
from bench_search import agreement, build_model
from safetensors.torch import save_file
from timing import Results, environment, in_process

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from helpers.random_mllama import random_inputs

MISSING = 77  # the exit code where mlx-vlm is not installed
ENGINE = (("none", "float32"), ("none", "bfloat16"), ("int8", "float32"))
MLX = ("float32", "4-bit")
INPUTS = "inputs.st"  # no name that mlx-vlm would take for weights


def write_model(folder: Path, steps: int) -> list[int]:
    """Write the model and a question as mlx-vlm reads them. Returns transformers' greedy tokens."""
    model = build_model("cpu")
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["num_attention_heads"] = config["vision_config"]["attention_heads"]  # mlx-vlm's name
    (folder / "config.json").write_text(json.dumps(config))
    inputs = random_inputs(model, length=PROMPT_TOKENS, ratio_id=ONE_TILE, seed=0)
    save_file({name: tensor.contiguous() for name, tensor in inputs.items()}, folder / INPUTS)
    return model.generate(**inputs, do_sample=False, max_new_tokens=steps)[0, PROMPT_TOKENS:].tolist()


def run_engine(folder: Path, case: tuple[str, str], steps: int) -> dict[str, Any]:
    script = str(Path(__file__).with_name("bench_quantize.py"))
    found = json.loads(in_process(script, "--one", str(folder), *case, str(steps), "1", "--device", "cpu"))
    return {"ms": found["ms"]["1"]}


def run_mlx(python: str, blas: Path | None, folder: Path, case: str, steps: int) -> dict[str, Any]:
    script = str(Path(__file__).with_name("mlx_decode.py"))
    given = dict(os.environ)
    if blas:
        given |= {"LD_PRELOAD": str(blas.resolve()), "LD_LIBRARY_PATH": str(blas.resolve().parent)}
    command = [python, script, str(folder), INPUTS, case, str(steps)]
    run = subprocess.run(command, env=given, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError((run.stderr.splitlines() or [f"exit code {run.returncode}"])[-1])
    found = json.loads(run.stdout.splitlines()[-1])
    return {"ms": median(found["ms"][WARM_STEPS:]), "tokens": found["tokens"], "versions": found["versions"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mlx-python", help="the Python of an environment with mlx-vlm and mlx[cpu]")
    parser.add_argument("--mlx-blas", type=Path, help="a BLAS library for mlx in place of the one in its wheel")
    parser.add_argument("--steps", type=int, default=16, help="decode steps of a run, two of which are not counted")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    python = args.mlx_python or sys.executable
    if subprocess.run([python, "-c", "import mlx_vlm"], capture_output=True).returncode:
        print(f"{Path(sys.argv[0]).name} needs the package mlx-vlm, which {python} does not have: see --mlx-python")
        sys.exit(MISSING)
    blas = args.mlx_blas.name if args.mlx_blas else "of the wheel"
    results = Results(args.json, machine=environment("cpu"), steps=args.steps, rounds=args.rounds, mlx_blas=blas)
    ways: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        expected = write_model(folder, args.steps)
        for _ in range(args.rounds):
            for case in ENGINE:
                ways.setdefault(f"engine, {' '.join(case)}", []).append(run_engine(folder, case, args.steps))
            for kind in MLX:
                ways.setdefault(f"mlx-vlm, {kind}", []).append(run_mlx(python, args.mlx_blas, folder, kind, args.steps))
    print("| way | ms a step | tokens of transformers in float32 |\n| --- | --- | --- |")
    for way, rounds in ways.items():
        row = {**rounds[0], "way": way, "ms": median(each["ms"] for each in rounds)}
        same = ""
        if "tokens" in row:
            row["agreement"] = agreement([row.pop("tokens")], [expected])
            same = f"{row['agreement']:.0%}"
        results.add(row)
        print(f"| {way} | {row['ms']:.1f} | {same} |")


if __name__ == "__main__":
    with torch.no_grad():
        main()
