"""The matrix products of the decoder on a CPU: those of few rows with a large weight are our kernel's.

A decode step reads every weight for the sake of a few rows. The kernel reads weights faster than PyTorch's products do.
"""

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear as plain_linear

from llava_cot_kernels.checks import FLOATS
from llava_cot_kernels.linear import MOST_ROWS, few_row_linear

MIN_ELEMENTS = 1 << 18  # of a weight; a smaller one stays in a cache, and calling the kernel takes longer than it saves


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """As ``torch.nn.functional.linear``, which it calls where the kernel is not faster."""
    parts, num_rows = _readable(weight), x.shape[:-1].numel()
    if parts is None or num_rows > MOST_ROWS:
        return plain_linear(x, weight, bias)
    out = few_row_linear(x.reshape(num_rows, x.shape[-1]), *parts, bias)
    return out.view(*x.shape[:-1], len(weight))


def use_kernel(model: nn.Module) -> None:
    """Let the large linear layers of ``model``, the engine's own copy on a CPU, multiply by ``linear``."""
    for module in model.modules():
        if type(module) is nn.Linear and _readable(module.weight) is not None:
            module.forward = partial(_forward, module)  # type: ignore[method-assign]


def _forward(module: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return linear(x, module.weight, module.bias)


def _readable(weight: Any) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """What the kernel reads of a weight, and the scales of its rows if torchao has quantised it to int8.

    None if the weight is small, not on the CPU, or of another kind.
    """
    if type(weight).__name__ == "Int8Tensor" and weight.act_quant_kwargs is None and weight.act_pre_scale is None:
        data, scale = weight.qdata, weight.scale.flatten()
    elif type(weight) in (torch.Tensor, nn.Parameter) and weight.dtype in FLOATS:
        data, scale = weight, None
    else:
        return None
    has_scales = scale is None or len(scale) == len(data)
    is_large = data.numel() >= MIN_ELEMENTS
    return (data, scale) if data.device.type == "cpu" and data.stride(-1) == 1 and is_large and has_scales else None
