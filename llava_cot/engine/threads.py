"""How many threads a step runs on: one, where a step is too small to be worth the waiting of several."""

import torch
from torch import nn

ROWS = 16  # of a busy decode step
# Two threads gain nothing below this many multiply-adds an operator on a quiet machine, and wait for each other in
# every operator on a busy one.
MIN_WORK_PER_OPERATOR = 1 << 24


def threads_for(model: nn.Module, device: torch.device) -> int | None:
    """One for a model whose largest operator in a decode step is small, else None: as many as torch has been given."""
    if device.type != "cpu":
        return None
    work = ROWS * max(map(_elements, model.parameters()), default=0)
    return 1 if work < MIN_WORK_PER_OPERATOR else None


def _elements(weight: nn.Parameter) -> int:
    packed = getattr(weight, "quant_state", None)  # bitsandbytes' 4 bits: a byte of the parameter is two elements
    return weight.numel() if packed is None else packed.shape.numel()
