"""The matrix products of the decoder: those of few rows with a large weight are our kernel's.

A decode step reads every weight for the sake of a few rows. On a CPU the kernel reads weights faster than PyTorch's
products do. On a GPU it reads those of int8, which PyTorch would widen in memory, or read again for each row.
"""

from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear as plain_linear

from llava_cot_kernels.checks import FLOATS
from llava_cot_kernels.linear import MOST_ROWS, few_row_linear

DEVICES, INT8_DEVICES = {"cpu"}, {"cpu", "cuda"}  # on a GPU cuBLAS reads other weights at the speed of the memory
MIN_ELEMENTS = 1 << 18  # of a weight; a smaller one stays in a cache, and calling the kernel takes longer than it saves


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """As ``torch.nn.functional.linear``, which it calls where the kernel is not faster."""
    parts, num_rows = _readable(weight), x.shape[:-1].numel()
    if parts is None or num_rows > MOST_ROWS.get(x.device.type, 0):
        return plain_linear(x, weight, bias)
    out = few_row_linear(x.reshape(num_rows, x.shape[-1]), *parts, bias)
    return out.view(*x.shape[:-1], len(weight))


class FewRowLinear(nn.Linear):
    """A linear layer that multiplies by ``linear``."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)


def use_kernel(model: nn.Module) -> None:
    """Let the large linear layers of ``model``, the engine's own copy, multiply by ``linear``."""
    for module in model.modules():
        if type(module) is nn.Linear and _readable(module.weight) is not None:
            module.__class__ = FewRowLinear


def _readable(weight: Any) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """What the kernel reads of a weight, and the scales of its rows if torchao has quantised it to int8.

    None if the weight is small, or of a kind or on a device for which PyTorch's product is taken.
    """
    if type(weight).__name__ == "Int8Tensor" and weight.act_quant_kwargs is None and weight.act_pre_scale is None:
        data, scale = weight.qdata, weight.scale
        if scale.shape != (len(data), 1):  # a scale for each block
            return None
        scale = scale[:, 0]
    elif type(weight) in (torch.Tensor, nn.Parameter) and weight.dtype in FLOATS:
        data, scale = weight, None
    else:
        return None
    is_large = data.numel() >= MIN_ELEMENTS
    is_here = data.device.type in (DEVICES if scale is None else INT8_DEVICES)
    return (data, scale) if is_here and data.stride(-1) == 1 and is_large else None
