"""Which back end runs an op: the compiled one, Triton's, or the reference."""

from functools import cache

import torch


@cache
def available(op: str, device_type: str) -> tuple[str, ...]:
    """The back ends that can run ``op`` on tensors of ``device_type`` here, the fastest first."""
    found = []
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"llava_cot_kernels::{op}", device_type.upper()):
        found.append("native")
    return (*found, "reference")


def choose(op: str, device: torch.device, backend: str) -> str:
    """The back end for ``op``: ``"auto"`` is the fastest, an explicit choice that can't run raises ``ValueError``."""
    candidates = available(op, device.type)
    if backend == "auto":
        return candidates[0]
    if backend not in candidates:
        raise ValueError(f"backend of {op} on {device.type} must be one of {('auto', *candidates)}, got {backend!r}")
    return backend
