"""Triton compiles every launch for GPUs that need not be there, and it fits: the interpreter shows neither."""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

DTYPES = ("bfloat16", "float32")
NUM_ROWS = (16, 64, 2048)  # of linear_logprobs: a tile of its own for each
SHARED_BYTES = {80: 163 << 10, 90: 227 << 10}  # that a block may have
STACK_BYTES = {80: 256, 90: 96}  # of a thread: tiles are made for Hopper, and what walks through splits spills a little


def launches(call: Callable[[], None], capability: int) -> Iterator[str]:
    """The kernels that ``call`` launches, compiled as for its arguments and not run: name, registers, memory."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    device = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", capability, 32),
    )
    triton.runtime.driver.set_active(device)
    compiled, run = [], JITFunction.run
    JITFunction.run = lambda self, *args, **kwargs: compiled.append(run(self, *args, **{**kwargs, "warmup": True}))
    try:
        call()
    finally:
        JITFunction.run = run
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    for kernel in {id(kernel): kernel for kernel in compiled}.values():
        with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
            cubin.write(kernel.asm["cubin"])
            cubin.flush()
            command = [cuobjdump, "-res-usage", cubin.name]
            usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
        yield f"{kernel.metadata.name}: {registers} registers, {kernel.metadata.shared} shared, {stack} bytes of stack"


def logprob(dtype: torch.dtype, T: int, H: int = 4096, V: int = 128256) -> None:
    """linear_logprobs and its backward, of memory that is never touched."""
    from llava_cot_kernels.triton import logprob

    hidden, weight = torch.empty(T, H, dtype=dtype), torch.empty(V, H, dtype=dtype)
    grad_hidden, grad_weight = torch.empty_like(hidden), torch.empty_like(weight)
    targets, rows = torch.empty(T, dtype=torch.int64), [torch.empty(T) for _ in range(5)]
    logprob.linear_logprobs(hidden, weight, targets, 1.0, *rows[:3])
    logprob.linear_logprobs_backward(*rows[3:], hidden, weight, targets, *rows[1:3], 1.0, grad_hidden, grad_weight)


def attention(dtype: torch.dtype) -> None:
    """Both ops, with groups and without, merging splits and walking through them."""
    from llava_cot_kernels.triton import attention as kernels

    def empty(*sizes, dtype=torch.int32):
        return torch.empty(sizes, dtype=dtype)

    query, out = empty(2, 16, 32, 128, dtype=dtype)
    lse = empty(16, 32, dtype=torch.float32)
    cache, keys = empty(8, 16, 8, 128, dtype=dtype), empty(6404, 8, 128, dtype=dtype)
    table, lens, starts = empty(16, 66), empty(16), empty(17)
    for enough_programs in (kernels.ENOUGH_PROGRAMS, 1):
        kernels.ENOUGH_PROGRAMS = enough_programs
        for hints in ((empty(16), empty(1)), (None, None)):
            kernels.paged_attention(query, cache, cache, table, lens, starts, *hints, 0.1, out, lse)
        for num_images in (1, 4):
            offsets = empty(num_images + 1, dtype=torch.int64)
            kernels.shared_attention(query, keys, keys, empty(16), offsets, 0.1, out, lse)


def report(stem: str, capability: int, dtype: str) -> Iterator[str]:
    if stem == "attention":
        yield from launches(lambda: attention(getattr(torch, dtype)), capability)
        return
    for T in NUM_ROWS:
        for line in launches(lambda T=T: logprob(getattr(torch, dtype), T), capability):
            yield line.replace(":", f", T={T}:", 1)


@pytest.mark.parametrize(
    ("stem", "capability", "dtype"),
    [
        ("attention", 80, "bfloat16"),
        ("attention", 90, "bfloat16"),
        ("logprob", 90, "bfloat16"),
        ("logprob", 90, "float32"),
    ],
)
def test_compiles_and_fits(stem, capability, dtype):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, __file__, stem, str(capability), dtype]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert len(lines) >= (10 if stem == "attention" else 7 * len(NUM_ROWS)), run.stdout
    for line in lines:
        shared, stack = map(int, re.search(r"(\d+) shared, (\d+) bytes of stack", line).groups())
        assert shared <= SHARED_BYTES[capability], line
        assert stack <= (STACK_BYTES[capability] if stem == "attention" else 0), line


if __name__ == "__main__":  # python tests/kernels/test_triton_build.py STEM CAPABILITY DTYPE
    print(*report(sys.argv[1], int(sys.argv[2]), sys.argv[3]), sep="\n", flush=True)
