"""Measure the peak memory of linear_logprobs beyond inputs and results: ``python benchmarks/bench_logprob_memory.py``.

On CUDA the allocator counts it. On the CPU each call runs in a fresh process, and its peak resident memory is read. A
provider that fails leaves its error in the row. The others are measured anyway.
"""

import argparse
import sys
from pathlib import Path

import torch
from bench_logprob import LINEAR_SHAPES, linear_call, linear_inputs, linear_providers
from timing import Results, check_device, environment, in_process, memory_bytes

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def extra_memory(device: str, provider: str, T: int, H: int, V: int, dtype: str, backward: bool) -> int:
    """Return the extra bytes of one call in this process."""
    function = linear_providers(device, DTYPES[dtype])[provider]
    linear_call(function, linear_inputs(2, H, 64, DTYPES[dtype], backward, device))()  # loads libraries
    call = linear_call(function, linear_inputs(T, H, V, DTYPES[dtype], backward, device))
    if device == "cuda":
        call()  # tunes kernels
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results = call()
        peak = torch.cuda.max_memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak to the memory that is resident now
        before = memory_bytes("VmRSS")
        results = call()
        peak = memory_bytes("VmHWM")
    return peak - before - sum(result.nbytes for result in results)


def measure(device: str, provider: str, shape: tuple[int, ...], dtype: str, direction: str) -> int:
    if device == "cuda":
        return extra_memory(device, provider, *shape, dtype, direction != "forward")
    return int(in_process(__file__, "--device", device, "--one", provider, *map(str, shape), dtype, direction))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--one", nargs=6, metavar=("PROVIDER", "T", "H", "V", "DTYPE", "BACKWARD"))
    args = parser.parse_args()
    check_device(args.device)
    if args.one:
        provider, *sizes, dtype, direction = args.one
        print(extra_memory(args.device, provider, *map(int, sizes), dtype, direction != "forward"))
        return
    results, failed = Results(args.json, machine=environment(args.device)), False
    for shape in LINEAR_SHAPES[args.device][1:]:
        for dtype in DTYPES:
            for direction in ("forward", "forward and backward"):
                name = "T={} H={} V={}, {}, {}".format(*shape, dtype, direction)
                print(name)
                extra: dict[str, int] = {}
                errors: dict[str, str] = {}
                for provider in linear_providers(args.device, DTYPES[dtype]):
                    if provider == "torch.compile":  # the memory of its compiler would be counted too
                        continue
                    try:
                        extra[provider] = measure(args.device, provider, shape, dtype, direction)
                        print(f"  {provider:20} {extra[provider] / 2**20:8.1f} MiB", flush=True)
                    except Exception as error:
                        errors[provider] = f"{type(error).__name__}: {error}".splitlines()[0]
                        print(f"  {provider:20} failed: {errors[provider]}", flush=True)
                results.add({"case": name, "extra_bytes": extra, **({"errors": errors} if errors else {})})
                failed |= bool(errors)
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
