"""Decode one answer with mlx-vlm, in an environment of its own, and print its tokens and the milliseconds of each.

``python mlx_decode.py FOLDER INPUTS {float32,4-bit} TOKENS``: bench_mlx.py calls it.
"""

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx_vlm.generate.ar import generate_step
from mlx_vlm.utils import load_model


def main() -> None:
    folder, name, kind, tokens = sys.argv[1:]
    model = load_model(Path(folder))
    if kind == "4-bit":
        nn.quantize(model.language_model, group_size=64, bits=4)
        mx.eval(model.parameters())
    inputs = mx.load(str(Path(folder, name)), format="safetensors")
    given = [inputs.pop(key) for key in ("input_ids", "pixel_values", "attention_mask")]
    steps = generate_step(given[0], model, *given[1:], max_tokens=int(tokens), temperature=0.0, **inputs)
    drawn, times, start = [], [], time.perf_counter()
    for token, _ in steps:
        end = time.perf_counter()
        drawn.append(int(token))
        times.append((end - start) * 1e3)
        start = end
    versions = {package: version(package) for package in ("mlx", "mlx-vlm")}
    print(json.dumps({"tokens": drawn, "ms": times, "versions": versions}))


if __name__ == "__main__":
    main()
