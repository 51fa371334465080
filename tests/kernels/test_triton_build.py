"""Triton compiles every launch for GPUs that need not be there, and it fits: the interpreter shows neither."""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from llava_cot_kernels.checks import FLOATS

pytest.importorskip("triton")

NUM_ROWS = (16, 64, 2048)  # of linear_logprobs: a tile of its own for each
SHARED_BYTES = {80: 163 << 10, 90: 227 << 10}  # that a block may have
# Of a thread, where ptxas spills though it does not use all registers (64 query heads), and what Triton 3.6 leaves on
# sm_80 where programs walk through splits or have windows. Nothing else spills.
STACK_BYTES = {"90 float32": 8}
STACK_BYTES_BEFORE_3_7 = {"80 bfloat16": 32, "80 float16": 32}


class Built(NamedTuple):
    """What the compiler made of a launch, and what it was compiled for."""

    kernel: str
    configuration: dict[str, Any]
    registers: int  # of a thread
    stack: int  # bytes of a thread
    stores: int  # bytes that its code spills to the stack
    loads: int  # bytes that its code reads from there
    shared: int  # bytes of a block


def launches(call: Callable[[], None], capability: int) -> Iterator[Built]:
    """The kernels that ``call`` launches, compiled as for its arguments and not run."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    device = SimpleNamespace(
        get_current_device=lambda: capability,  # a kernel is compiled once for each device
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
    yield from map(measure, dict.fromkeys(compiled))


@cache
def measure(kernel) -> Built:
    """Spilled bytes are those of the instructions that store to local memory and load from it, as ptxas counts them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", cuobjdump("-res-usage", cubin.name)).groups()
        code = cuobjdump("-sass", cubin.name) if int(stack) else ""
    stores, loads = (
        sum(int(bits or 32) // 8 for bits in re.findall(rf"\b{name}(?:\.(64|128)|\.\w+)* ", code))
        for name in ("STL", "LDL")
    )
    numbers = int(registers), int(stack), stores, loads, kernel.metadata.shared
    return Built(kernel.metadata.name, configuration(kernel), *numbers)


def cuobjdump(option: str, cubin: str) -> str:
    import triton

    command = [Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump", option, cubin]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def configuration(kernel) -> dict[str, Any]:
    """The dtype, the constants, and what Triton specialises for: arguments that are 1, that are no multiple of 16."""
    source, params = kernel.src, kernel.src.fn.params
    kinds = [source.signature[param.name] for param in params]
    constants = {param.name: int(source.constants[param.num,]) for param in params if param.is_constexpr}
    constants |= {"num_warps": kernel.metadata.num_warps, "num_stages": kernel.metadata.num_stages}
    ones = [p.name for p, kind in zip(params, kinds) if kind == "constexpr" and not p.is_constexpr]
    loose = [
        param.name
        for param, kind in zip(params, kinds)
        if kind[0] in "*i" and not param.do_not_specialize and not source.attrs.get((param.num,))
    ]
    specialised = {"is 1": " ".join(ones), "no multiple of 16": " ".join(loose)}
    return {"dtype": min(kind for kind in kinds if kind[0] == "*")[1:], **constants, **specialised}


def logprob(dtype: torch.dtype, T: int, H: int = 4096, V: int = 128256, chunk: int | None = None) -> None:
    """linear_logprobs and its backward, of memory that is never touched."""
    from llava_cot_kernels.triton import logprob

    hidden, weight = torch.empty(T, H, dtype=dtype), torch.empty(V, H, dtype=dtype)
    grad_hidden, grad_weight = torch.empty_like(hidden), torch.empty_like(weight)
    targets, rows = torch.empty(T, dtype=torch.int64), [torch.empty(T) for _ in range(5)]
    if chunk:
        logprob.DLOGITS_BYTES = chunk * T * hidden.element_size()
    logprob.linear_logprobs(hidden, weight, targets, 1.0, *rows[:3])
    logprob.linear_logprobs_backward(*rows[3:], hidden, weight, targets, *rows[1:3], 1.0, grad_hidden, grad_weight)


def linear(dtype: torch.dtype, rows: int, outputs: int = 4096) -> None:
    """few_row_linear of int8 weights with 4096 columns."""
    from llava_cot_kernels.triton import linear as kernels

    x, weight = torch.empty(rows, 4096, dtype=dtype), torch.empty(outputs, 4096, dtype=torch.int8)
    kernels.few_row_linear(x, weight, torch.empty(outputs), None, torch.empty(rows, outputs, dtype=dtype))


def linears(dtype: torch.dtype) -> None:
    """Every tile."""
    for rows, outputs in product((16, 32, 64), (1024, 4096)):
        linear(dtype, rows, outputs)


def paged(
    dtype: torch.dtype, grouped: bool, walk: bool, window: int = 0,
    heads: int = 32, kv_heads: int = 8, head_dim: int = 128, page_size: int = 16, offset: int = 0,
) -> None:  # fmt: skip
    """paged_attention of 16 sequences, of a walk through splits or of splits to be merged."""
    from llava_cot_kernels.triton import attention as kernels

    def empty(*sizes, dtype=torch.int32):
        return torch.empty(*sizes[:-1], sizes[-1] + offset, dtype=dtype)[..., offset:]

    kernels.ENOUGH_PROGRAMS = 1 if walk else 1 << 30
    query, cache = empty(16, heads, head_dim, dtype=dtype), empty(8, page_size, kv_heads, head_dim, dtype=dtype)
    table, hints = empty(16, 1056 // page_size), (empty(16), empty(1)) if grouped else (None, None)
    out, lse = torch.empty(16, heads, head_dim, dtype=dtype), torch.empty(16, heads)
    kernels.paged_attention(query, cache, cache, table, empty(16), empty(17), *hints, 0.1, window, out, lse)


def image(
    dtype: torch.dtype, num_images: int, walk: bool,
    heads: int = 32, kv_heads: int = 8, head_dim: int = 128, offset: int = 0,
) -> None:  # fmt: skip
    """shared_attention of 16 rows, likewise."""
    from llava_cot_kernels.triton import attention as kernels

    kernels.ENOUGH_PROGRAMS = 1 if walk else 1 << 30
    query = torch.empty(16, heads, head_dim + offset, dtype=dtype)[..., offset:]
    keys = torch.empty(6404, kv_heads, head_dim + offset, dtype=dtype)[..., offset:]
    group, offsets = torch.empty(16, dtype=torch.int32), torch.empty(num_images + 1, dtype=torch.int64)
    out, lse = torch.empty(16, heads, head_dim, dtype=dtype), torch.empty(16, heads)
    kernels.shared_attention(query, keys, keys, group, offsets, 0.1, out, lse)


def attention(dtype: torch.dtype, page_size: int = 16, **shape) -> None:
    """Both ops, with groups and without, merging splits and walking through them, with windows and without."""
    for walk in (False, True):
        for grouped in (False, True):
            for window in (0, 512):
                paged(dtype, grouped, walk, window, page_size=page_size, **shape)
            image(dtype, 1 + grouped, walk, **shape)


def everything() -> Iterator[Callable[[], None]]:
    """Calls that launch every kernel with every tile of every dtype.

    Attention: every tile with 4 query heads to a key head, as the 11B model has, and the tiles of its head dim with 1,
    8 and 64. linear_logprobs: the least rows of each choice of tiles, and every number of spans to be merged.
    few_row_linear: every tile.
    """
    from llava_cot_kernels.triton import logprob as kernels
    from llava_cot_kernels.triton.attention_tile import TILES

    bounds = sorted({bound for _, bound in TILES})
    for dtype in FLOATS:
        for head_dim in (*bounds[:-1], 2 * bounds[-2]):
            yield partial(attention, dtype, heads=4, kv_heads=1, head_dim=head_dim)
        for heads in (1, 8, 64):
            yield partial(attention, dtype, heads=heads, kv_heads=1)
        yield partial(linears, dtype)
        tiles: dict[tuple, int] = {}
        for T in range(1, 4097):
            choices = kernels.logits_tile, kernels.grad_weight_tile, kernels.grad_hidden_tile
            tiles.setdefault(tuple(choice(T, dtype) for choice in choices), T)
        for T, chunk in product(tiles.values(), (128256, 3000)):
            yield partial(logprob, dtype, T, chunk=chunk)
    for spans in (1 << bits for bits in range(13)):
        yield partial(logprob, torch.float32, 1, 16, spans * 64, chunk=3000)


def table() -> str:
    """A section for each kernel, a line for each configuration; what is the same in all lines stands above them."""
    import triton

    sections: dict[str, dict[tuple, dict[int, Built]]] = {}
    for capability in SHARED_BYTES:
        for call in everything():
            for built in launches(call, capability):
                lines = sections.setdefault(built.kernel, {})
                lines.setdefault(tuple(built.configuration.items()), {})[capability] = built
    text = [
        f"Triton {triton.__version__}, ptxas {triton.knobs.nvidia.ptxas.version}.",
        "Of a thread: registers, bytes of stack, bytes of spill stores and of spill loads.",
        "Of a block: bytes of shared memory, with a ! where they are more than it can have.",
    ]
    for kernel, lines in sorted(sections.items()):
        configurations, numbers = zip(*sorted(lines.items()))
        columns = [column for column in zip(*configurations) if len(set(column)) > 1]
        fixed = [f"{column[0][0]}={column[0][1]}" for column in zip(*configurations) if len(set(column)) == 1]
        rows = [[name for (name, _), *_ in columns]]
        rows += [[str(column[line][1]) for column in columns] for line in range(len(lines))]
        for capability, most in SHARED_BYTES.items():
            rows[0] += [f"sm_{capability}:", *Built._fields[2:]]
            for row, built in zip(rows[1:], numbers):
                *others, shared = built[capability][2:]
                row += ["", *map(str, others), f"{shared}{'!' * (shared > most)}"]
        widths = [max(map(len, column)) for column in zip(*rows)]
        text += ["", f"{kernel}: {', '.join(name for name in fixed if name[-1] != '=')}"]
        text += ["  ".join(map(str.rjust, row, widths)).rstrip() for row in rows]
    return "\n".join(text)


def some_attention(dtype: torch.dtype) -> None:
    """What one question launches, and the variants that need most registers: walks, windows and sorted rows."""
    paged(dtype, False, False)
    paged(dtype, False, True, 512)
    paged(dtype, True, False, 512)
    image(dtype, 2, True)


def report(stem: str, capability: int, dtype: str) -> Iterator[Built]:
    """What a case of the test compiles. ``stem`` is a key of ``CASES`` or ``FULL_CASES``."""
    if stem == "logprob":
        for T in NUM_ROWS:
            yield from launches(lambda T=T: logprob(getattr(torch, dtype), T), capability)
        return
    if stem == "linear":
        yield from launches(lambda: linears(getattr(torch, dtype)), capability)
        return
    calls = some_attention if stem == "some attention" else attention
    yield from launches(lambda: calls(getattr(torch, dtype)), capability)
    yield from launches(lambda: paged(getattr(torch, dtype), False, False, heads=64, kv_heads=1), capability)


CASES = {  # and the least number of kernels of a case
    "some attention": (["80 bfloat16", "90 bfloat16", "90 float32"], 10),
    "logprob": (["90 bfloat16", "90 float32"], 7 * len(NUM_ROWS)),
    "linear": (["80 bfloat16", "80 float32", "90 bfloat16", "90 float16", "90 float32"], 6),
}
FULL_CASES = {"attention": (["80 bfloat16", "80 float16", "90 bfloat16", "90 float16", "90 float32"], 16)}


@pytest.mark.parametrize("stem", [*CASES, *FULL_CASES])
def test_compiles_and_fits(stem, is_full):
    """A spill is a register of a thread that has no room and goes to memory, where ptxas reports a stack.

    What is allowed stands in ``STACK_BYTES``. float32 on sm_80 is not a case.
    """
    import triton

    stack_bytes = STACK_BYTES
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7):
        stack_bytes = stack_bytes | STACK_BYTES_BEFORE_3_7
    if stem in FULL_CASES and not is_full:
        pytest.skip("all variants of attention are compiled with --full")
    cases, least = {**CASES, **FULL_CASES}[stem]
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, __file__, stem, *cases]  # one process: importing torch and Triton takes seconds
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    lines: dict[str, list[list]] = {case: [] for case in cases}
    for line in run.stdout.splitlines():
        case, built = json.loads(line)
        lines[case].append(built)
    for case, launched in lines.items():
        assert len(launched) >= least, run.stdout
        for built in launched:
            built = Built(*built)
            assert built.shared <= SHARED_BYTES[int(case.split()[0])], (case, built)
            attends = built.kernel.startswith("_attend")
            assert built.stack <= (stack_bytes.get(case, 0) if attends else 0), (case, built)


if __name__ == "__main__":  # python tests/kernels/test_triton_build.py > benchmarks/results/triton_build.txt
    if sys.argv[1:]:  # cases of the test: STEM "CAPABILITY DTYPE" ...
        for case in sys.argv[2:]:
            capability, dtype = case.split()
            for built in report(sys.argv[1], int(capability), dtype):
                print(json.dumps([case, built]), flush=True)
    else:
        print(table())
