"""What a compiled function launches on CUDA, from the code that Inductor writes for it. No GPU is needed.

The function runs on tensors without data, on the meta device. Between AOTAutograd and Inductor its graph moves to a
CUDA device whose properties are those of an H200, and Inductor writes Triton kernels and the calls of all kernels. That
code is read and not run.
"""

import copy
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch._inductor.config
from torch._dynamo import device_interface
from torch._dynamo.utils import detect_fake_mode
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.graph import GraphLowering
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils._python_dispatch import _disable_current_modes

from llava_cot.engine.compile import CUDA_OPTIONS

CUDA = torch.device("cuda", 0)
H200 = SimpleNamespace(
    **{"name": "H200", "major": 9, "minor": 0, "multi_processor_count": 132, "warp_size": 32},
    **{"max_threads_per_multi_processor": 2048, "max_threads_per_block": 1024, "regs_per_multiprocessor": 65536},
    **{"total_memory": 141 << 30, "L2_cache_size": 50 << 20},
    **{"shared_memory_per_block": 48 << 10, "shared_memory_per_block_optin": 227 << 10},
    gcnArchName="",  # which Inductor asks for where torch has no CUDA
)
LAUNCH = re.compile(r"(?:^|\s)((?:torch\.ops|aten|extern_kernels)(?:\.\w+)+|\w+\.run|\w+\.copy_)\(")


class _Written(Exception):
    """Ends a compilation: the code is there."""

    def __init__(self, code: str):
        self.code = code


class Code:
    """The code of a graph, and how often it was run."""

    def __init__(self, text: str):
        self.text = text
        call = text[text.index("    def call(self, args):") :]
        self.call = call[: call.index("        return (")]
        self.launches = Counter(LAUNCH.findall(self.call))
        self.runs = 0


@contextmanager
def compiling_for_cuda() -> Iterator[list[Code]]:
    """A context in which what torch compiles for tensors on the meta device is code for CUDA, in this list."""
    codes: list[Code] = []
    backend, torch_compile = partial(_compile, codes), torch.compile

    def compile(function: Callable[..., Any], **settings: Any) -> Callable[..., Any]:
        compiled = torch_compile(function, **settings, backend=backend)

        def run(*args: Any, **kwargs: Any) -> Any:
            with _disable_current_modes():  # Dynamo compiles nothing while operators are recorded
                return compiled(*args, **kwargs)

        return run

    with patch.object(torch, "compile", compile):
        yield codes


def _compile(codes: list[Code], graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
    def compile_inner(graph: torch.fx.GraphModule, inputs: list[Any], **settings: Any) -> Callable[[list[Any]], Any]:
        codes.append(code := Code(_write(graph, inputs, settings)))

        def run(given: list[Any]) -> Any:
            code.runs += 1
            given, _ = [*given], given.clear()
            return graph(*given)

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    with torch._inductor.config.patch(joint_graph_constant_folding=False):  # which replaces outputs without data
        return compile_fx(graph, inputs, inner_compile=compile_inner)


def _write(graph: torch.fx.GraphModule, inputs: list[Any], settings: dict[str, Any]) -> str:
    moved = torch.fx.GraphModule(graph, copy.deepcopy(graph.graph))
    for node in moved.graph.nodes:
        if node.kwargs.get("device") == torch.device("meta"):
            node.kwargs = node.kwargs | {"device": CUDA}
    fake_mode = detect_fake_mode(inputs)
    with fake_mode:
        inputs = [
            torch.empty_strided(each.shape, each.stride(), dtype=each.dtype, device=CUDA)
            if isinstance(each, torch.Tensor) and each.is_meta
            else each
            for each in inputs
        ]
    FakeTensorProp(moved, fake_mode).propagate_dont_convert_inputs(*inputs)
    try:
        with _on_h200():
            compile_fx_inner(moved, inputs, **settings)
    except Exception as error:
        found: BaseException | None = error
        while found is not None and not isinstance(found, _Written):
            found = found.__cause__ or found.__context__
        if found is None:
            raise
        return found.code
    raise AssertionError("Inductor must have written code")


def _raise_code(graph: GraphLowering) -> None:
    raise _Written(graph.codegen()[0].value)


@contextmanager
def _on_h200() -> Iterator[None]:
    interface = device_interface.CudaInterface
    with ExitStack() as stack:
        for owner, name, value in (
            (torch.cuda, "get_device_properties", lambda *_: H200),
            (torch.cuda, "get_device_capability", lambda *_: (9, 0)),
            (torch.cuda, "current_device", lambda: 0),
            (interface, "get_device_properties", staticmethod(lambda *_: H200)),
            (interface, "current_device", staticmethod(lambda: 0)),
            (interface, "is_bf16_supported", staticmethod(lambda *_, **__: True)),
            (GraphLowering, "compile_to_module", _raise_code),
        ):
            stack.enter_context(patch.object(owner, name, value))
        stack.enter_context(patch("torch._inductor.scheduler.has_triton", lambda: True))
        stack.enter_context(patch("torch.utils._triton.triton_hash_with_backend", lambda: ""))
        stack.enter_context(patch("torch._inductor.fx_passes.joint_graph.lazy_init", lambda *_: None))  # runs on CUDA
        stack.enter_context(patch.dict(device_interface.caching_worker_device_properties, cuda=[H200]))
        stack.enter_context(patch.dict(device_interface.caching_worker_current_devices, cuda=0))
        stack.enter_context(torch._inductor.config.patch(fx_graph_cache=False, compile_threads=1, **CUDA_OPTIONS))
        yield
