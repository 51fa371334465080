"""AdamW in bfloat16 with random rounding, so that small updates are not lost."""

from collections.abc import Callable, Iterable
from typing import overload

import torch
from torch import nn
from torch.distributed.tensor import DTensor

CHUNK = 1 << 24  # elements updated at a time; float32 copies of the whole embedding of an 11B model would take 12 GB


class StochasticAdamW(torch.optim.Optimizer):
    """AdamW that rounds bfloat16 weights and moments up or down at random, so that they are right on average.

    An update of 1e-5 is below half a step of most bfloat16 weights, so rounding to nearest would drop it every time.
    This optimizer takes 6 bytes a parameter, and AdamW on float32 takes 12, not counting gradients. The random numbers
    come from torch's generator, so a run that restores its state repeats exactly.

    Source: Zamirai et al., "Revisiting BFloat16 Training", 2020 (arXiv:2010.06192), stochastic rounding.

    Raises:
        ValueError: a parameter is not bfloat16.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        for group in self.param_groups:
            for param in group["params"]:
                if param.dtype != torch.bfloat16:
                    raise ValueError(f"params must be bfloat16, got {param.dtype}")

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update the parameters that have a gradient."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, group)
        return loss

    def _update(self, param: nn.Parameter, group: dict) -> None:
        state = self.state[param]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(param), torch.zeros_like(param)
        state["step"] += 1
        step, (beta1, beta2) = state["step"].item(), group["betas"]
        assert param.grad is not None
        tensors: tuple[torch.Tensor, ...] = (param, param.grad, state["exp_avg"], state["exp_avg_sq"])
        for weight, grad, first, second in zip(*(_local(tensor).view(-1).split(CHUNK) for tensor in tensors)):
            grad = grad.float()
            mean = first.float().lerp_(grad, 1 - beta1)
            square = second.float().mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            scale = (square / (1 - beta2**step)).sqrt_().add_(group["eps"])
            new = weight.float().mul_(1 - group["lr"] * group["weight_decay"])
            new.addcdiv_(mean, scale, value=-group["lr"] / (1 - beta1**step))
            for target, value in ((weight, new), (first, mean), (second, square)):
                round_stochastically_(target, value)


def round_stochastically_(target: torch.Tensor, value: torch.Tensor) -> None:
    """Set bfloat16 ``target`` to one of the two neighbours of float32 ``value``, whose mean is ``value``.

    ``value`` must be finite. It is overwritten.
    """
    bits = value.view(torch.int32)
    bits += torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, device=bits.device)
    bits &= -(1 << 16)  # the remaining bits are exact in bfloat16
    target.copy_(value)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
