"""The optimizer of a run."""

from collections.abc import Iterable

import torch
from torch import nn

from llava_cot.train.config import Optimizer


def build_optimizer(parameters: Iterable[nn.Parameter], settings: Optimizer) -> torch.optim.Optimizer:
    """AdamW over what is trained.

    Raises:
        ValueError: ``adamw8bit`` without torchao.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    options = {"betas": settings.betas, "eps": settings.eps, "weight_decay": settings.weight_decay}
    if settings.name == "adamw":
        return torch.optim.AdamW(trained, lr=settings.lr, fused=True, **options)
    try:
        from torchao.optim import AdamW8bit
    except ImportError:
        raise ValueError("optimizer.name must be adamw where torchao is not installed, got adamw8bit") from None
    return AdamW8bit(trained, lr=settings.lr, bf16_stochastic_round=settings.stochastic_rounding, **options)
