"""Extra peak memory of linear_logprobs, beyond inputs and results: ``python benchmarks/bench_logprob_memory.py``.

On CUDA the allocator counts it. On the CPU each call is made by a fresh process, whose peak resident memory is read.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from bench_logprob import LINEAR_SHAPES, linear_call, linear_inputs, linear_providers
from timing import environment

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def extra_memory(device: str, provider: str, T: int, H: int, V: int, dtype: str, backward: bool) -> int:
    """In bytes, of one call in this process."""
    function = linear_providers(device, DTYPES[dtype])[provider]
    linear_call(function, linear_inputs(2, H, 64, DTYPES[dtype], backward, device))()  # loads libraries
    call = linear_call(function, linear_inputs(T, H, V, DTYPES[dtype], backward, device))
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results = call()
        peak = torch.cuda.max_memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
        before = _status("VmRSS")
        results = call()
        peak = _status("VmHWM")
    return peak - before - sum(result.nbytes for result in results)


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--one", nargs=6, metavar=("PROVIDER", "T", "H", "V", "DTYPE", "BACKWARD"))
    args = parser.parse_args()
    if args.one:
        provider, *sizes, dtype, direction = args.one
        print(extra_memory(args.device, provider, *map(int, sizes), dtype, direction != "forward"))
        return
    rows = []
    for shape in LINEAR_SHAPES[args.device][1:]:
        for dtype in DTYPES:
            for direction in ("forward", "forward and backward"):
                name = "T={} H={} V={}, {}, {}".format(*shape, dtype, direction)
                print(name)
                extra = {}
                for provider in linear_providers(args.device, DTYPES[dtype]):
                    if provider != "torch.compile":  # its compiler's own memory would be counted too
                        one = [provider, *map(str, shape), dtype, direction]
                        command = [sys.executable, __file__, "--device", args.device, "--one", *one]
                        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                        extra[provider] = int(output.split()[-1])
                        print(f"  {provider:20} {extra[provider] / 2**20:8.1f} MiB", flush=True)
                rows.append({"case": name, "extra_bytes": extra})
    if args.json:
        args.json.write_text(json.dumps({"machine": environment(args.device), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
