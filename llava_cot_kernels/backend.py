"""Choose the back end of an op: the compiled one, Triton's, or the reference."""

import warnings
from functools import cache
from importlib import import_module
from importlib.util import find_spec

import torch

from llava_cot_kernels import _C  # noqa: F401  (without the extension an op is an error; it does not fall back)

OPS = {"native": torch.ops.llava_cot_kernels, "triton": torch.ops.llava_cot_kernels_triton}
"""The namespaces whose ops fill outputs: same names, same arguments."""

_TRITON_MODULES: dict[str, str] = {  # op: module of llava_cot_kernels.triton that registers it
    "paged_attention": "attention",
    "shared_attention": "attention",
    "linear_logprobs": "logprob",
    "few_row_linear": "linear",
}


@cache
def available(op: str, device_type: str) -> tuple[str, ...]:
    """Return the back ends that can run ``op`` on tensors of ``device_type`` on this machine, the fastest first.

    Triton runs on CUDA. It also runs on the CPU if its interpreter is on (TRITON_INTERPRET=1) and works. The
    interpreter of Triton 3.6 does not work with numpy 2.5.

    Raises:
        ValueError: the device is "meta", whose tensors have no values.
    """
    if device_type == "meta":
        raise ValueError(f"tensors of {op} must be on a device that holds values, such as cpu, got meta")
    found = []
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"llava_cot_kernels::{op}", device_type.upper()):
        found.append("native")
    if op in _TRITON_MODULES and find_spec("triton") and (device_type == "cuda" or _triton_interprets()):
        import_module(f"llava_cot_kernels.triton.{_TRITON_MODULES[op]}")
        found.append("triton")
    return (*found, "reference")


@torch.compiler.assume_constant_result
def choose(op: str, device_type: str, backend: str) -> str:
    """Return the back end for ``op``: for ``"auto"`` the fastest, otherwise ``backend`` itself.

    Raises:
        ValueError: an explicit choice that cannot run here.
    """
    candidates = available(op, device_type)
    if backend == "auto":
        return candidates[0]
    if backend not in candidates:
        raise ValueError(f"backend of {op} on {device_type} must be one of {('auto', *candidates)}, got {backend!r}")
    return backend


@cache
def _triton_interprets() -> bool:
    import numpy
    import triton

    if not triton.knobs.runtime.interpret:
        return False
    versions = [tuple(map(int, module.__version__.split(".")[:2])) for module in (triton, numpy)]
    if versions[0] < (3, 7) and versions[1] >= (2, 5):
        message = "TRITON_INTERPRET=1 needs Triton >= 3.7 or numpy < 2.5, got Triton {}.{} and numpy {}.{}"
        warnings.warn(message.format(*versions[0], *versions[1]), stacklevel=2)
        return False
    return True
