"""The optimizer of a run."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from llava_cot.train.config import Optimizer
from llava_cot.train.stochastic_adamw import StochasticAdamW


def build_optimizer(parameters: Iterable[nn.Parameter], settings: Optimizer) -> torch.optim.Optimizer:
    """Build AdamW over the trained parameters.

    Raises:
        ValueError: ``adamw8bit`` without torchao.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    options: dict[str, Any] = {"betas": settings.betas, "eps": settings.eps, "weight_decay": settings.weight_decay}
    if settings.name == "adamw":
        return torch.optim.AdamW(trained, lr=settings.lr, fused=True, **options)
    if settings.name == "adamw_stochastic":
        return StochasticAdamW(trained, lr=settings.lr, **options)
    try:
        from torchao.optim import AdamW8bit
    except ImportError:
        raise ValueError("optimizer.name must be adamw where torchao is not installed, got adamw8bit") from None
    return AdamW8bit(trained, lr=settings.lr, **options)
