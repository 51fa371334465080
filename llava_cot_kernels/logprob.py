"""Log-probs of given tokens without a softmax tensor, from logits or from hidden states and the output embedding."""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from llava_cot_kernels.backend import OPS, choose
from llava_cot_kernels.checks import FLOATS, Sizes, can_read, check_finite
from llava_cot_kernels.reference import logprob as reference
from llava_cot_kernels.reference.logprob import IGNORE_INDEX

STORED_LOGITS = 8 << 20
"""Logits of so many bytes are stored for the backward in any case."""


def token_logprobs(logits: torch.Tensor, targets: torch.Tensor, *, backend: str = "auto") -> torch.Tensor:
    """Return the log-prob of one token per row of logits, differentiable in the logits.

    ``logprobs[t] = logits[t, targets[t]] - logsumexp(logits[t])``. The forward pass stores no softmax. The gradient of
    the logits is itself a [T, V] tensor.

    Args:
        logits: [T, V], float32, bfloat16 or float16. ``-inf`` masks a token; as a target it gives ``-inf``. A row that
            has a NaN or ``+inf``, or nothing but ``-inf``, gives NaN.
        targets: int64 [T], token ids in [0, V), or -100 to leave a row out. Such a row gives 0 and no gradient.
        backend: ``"auto"``, ``"native"`` or ``"reference"``.

    Returns:
        logprobs: float32 [T], in nats.

    Raises:
        ValueError, TypeError: an argument has another shape, dtype, device or range than stated here.

    Source: Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018 (arXiv:1805.02867).
    """
    sizes = Sizes()
    sizes.check("logits", logits, "T V", FLOATS)
    sizes.check("targets", targets, "T", torch.int64, logits.device)
    _check_targets(targets, sizes["V"])
    if choose("token_logprobs", logits.device.type, backend) == "reference":
        return reference.token_logprobs(logits, targets)
    return _TokenLogprobs.apply(_unit_stride(logits), targets.contiguous())


def linear_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Return the log-prob of one token per hidden state under a linear output layer, differentiable in both.

        logits = hidden @ weight.T / temperature
        logprobs[t] = logits[t, targets[t]] - logsumexp(logits[t])
        entropy[t] = -sum_v p[t, v] log p[t, v]

    The forward carries a running maximum, sum and entropy over tiles of the vocabulary. The backward recomputes the
    logits of a tile from the saved logsumexp, so a [T, V] tensor needs no memory. On the CPU it finds them instead if
    they take at most 8 MiB, or fit into the gradient of ``weight``: the forward allocates that gradient then, and
    leaves the logits in it. The peak memory of forward and backward is the same.

    Products and sums are float32 for every dtype and have a fixed order: with the same number of threads, equal inputs
    give equal bits. Where the hardware multiplies 16-bit numbers (Triton, and bfloat16 on CPUs with AVX512-BF16), the
    backward rounds the gradient of the logits to the dtype of the inputs, as plain PyTorch does.

    Args:
        hidden: [T, H], float32, bfloat16 or float16.
        weight: [V, H], in the dtype of ``hidden``.
        targets: int64 [T], token ids in [0, V), or -100 to leave a row out. Such a row costs nothing and gives 0 and no
            gradient. On a GPU targets are not checked, and any other value gives NaN.
        temperature: the divisor of the logits, > 0 and finite in float32.
        entropy: whether to return the entropy of the whole distribution too.
        backend: ``"auto"``, ``"native"``, ``"triton"`` or ``"reference"``.

    Returns:
        logprobs: float32 [T], in nats; with ``entropy=True`` the pair (logprobs, entropy), both float32 [T].

    Raises:
        ValueError, TypeError: an argument has another shape, dtype, device or range than stated here.

    Source: Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", 2024 (arXiv:2411.09009).
    """
    sizes = Sizes()
    sizes.check("hidden", hidden, "T H", FLOATS)
    sizes.check("weight", weight, "V H", hidden.dtype, hidden.device)
    sizes.check("targets", targets, "T", torch.int64, hidden.device)
    _check_targets(targets, sizes["V"])
    temperature = check_finite("temperature", temperature)
    if temperature <= 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    chosen = choose("linear_logprobs", hidden.device.type, backend)
    if chosen == "reference":
        return reference.linear_logprobs(hidden, weight, targets, temperature=temperature, entropy=entropy)
    stores_logits = chosen == "native" and torch.is_grad_enabled()
    logprobs, entropies = _LinearLogprobs.apply(
        _unit_stride(hidden), _unit_stride(weight), targets.contiguous(), temperature, chosen, stores_logits
    )
    return (logprobs, entropies) if entropy else logprobs


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logprobs = torch.empty_like(targets, dtype=torch.float32)
        OPS["native"].token_logprobs(logits, targets, logprobs)
        ctx.save_for_backward(logits, targets)
        return logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: torch.Tensor) -> tuple[torch.Tensor, None]:
        logits, targets = ctx.saved_tensors
        if not logits.numel():
            return torch.zeros_like(logits), None
        grad, target = grad_logprobs[:, None], targets.clamp(0, logits.shape[1] - 1)[:, None]
        grad_logits = torch.softmax(logits, dim=-1, dtype=torch.float32).mul_(-grad).scatter_add_(1, target, grad)
        grad_logits.masked_fill_(targets[:, None] == IGNORE_INDEX, 0)
        return grad_logits.to(logits.dtype), None


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        temperature: float,
        backend: str,
        stores_logits: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logprobs, lse, entropy = (torch.empty_like(targets, dtype=torch.float32) for _ in range(3))
        ctx.logits = _memory_for_logits(len(hidden), weight, *ctx.needs_input_grad[:2]) if stores_logits else None
        stored = () if ctx.logits is None else (ctx.logits,)
        OPS[backend].linear_logprobs(hidden, weight, targets, temperature, logprobs, lse, entropy, *stored)
        ctx.save_for_backward(hidden, weight, targets, lse, entropy)
        ctx.temperature, ctx.backend = temperature, backend
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_logprobs: torch.Tensor, grad_entropy: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None, None, None]:
        hidden, weight, targets, lse, entropy = ctx.saved_tensors
        logits, ctx.logits = ctx.logits, None  # another backward through the same graph recomputes them
        stored = () if logits is None else (logits,)
        grad_hidden = _empty_gradient(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = None
        if ctx.needs_input_grad[1]:
            is_gradient = logits is not None and logits.shape == weight.shape
            grad_weight = logits if is_gradient else _empty_gradient(weight)
        OPS[ctx.backend].linear_logprobs_backward(
            grad_logprobs.contiguous(),
            grad_entropy.contiguous(),
            hidden,
            weight,
            targets,
            lse,
            entropy,
            ctx.temperature,
            grad_hidden,
            grad_weight,
            *stored,
        )
        return grad_hidden, grad_weight, None, None, None, None


def _memory_for_logits(
    num_rows: int, weight: torch.Tensor, needs_hidden: bool, needs_weight: bool
) -> torch.Tensor | None:
    """Return memory in which the forward can leave float32 logits for the backward, or None.

    If the logits are large and fit into the gradient of ``weight``, it is that gradient.
    """
    floats_per_token = (num_rows + 15) // 16 * 16
    size = 4 * len(weight) * floats_per_token
    if size <= STORED_LOGITS and (needs_hidden or needs_weight):
        return weight.new_empty(size // 4, dtype=torch.float32)
    fits = floats_per_token * 4 <= weight.shape[1] * weight.element_size()
    if fits and needs_weight and not torch.compiler.is_compiling():
        return _empty_gradient(weight)
    return None


def _empty_gradient(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _unit_stride(matrix: torch.Tensor) -> torch.Tensor:
    """Return a matrix whose rows are contiguous. The kernels accept any distance between rows."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _check_targets(targets: torch.Tensor, vocab_size: int) -> None:
    if not can_read(targets) or not targets.numel():
        return
    smallest, largest = torch.aminmax(targets)
    if int(smallest) >= 0 and int(largest) < vocab_size:  # one pass where no row is left out
        return
    bad = (targets != IGNORE_INDEX) & ((targets < 0) | (targets >= vocab_size))
    if bad.any():
        position = int(bad.nonzero()[0])
        raise ValueError(
            f"targets must be {IGNORE_INDEX} or in [0, V={vocab_size}), got {int(targets[position])} at {position}"
        )


@torch.library.register_fake("llava_cot_kernels::token_logprobs")
def _(logits: torch.Tensor, targets: torch.Tensor, logprobs: torch.Tensor) -> None:
    return None


@torch.library.register_fake("llava_cot_kernels::linear_logprobs")
def _(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    temperature: float,
    logprobs: torch.Tensor,
    lse: torch.Tensor,
    entropy: torch.Tensor,
    logits: torch.Tensor | None = None,
) -> None:
    return None


@torch.library.register_fake("llava_cot_kernels::linear_logprobs_backward")
def _(
    grad_logprobs: torch.Tensor,
    grad_entropy: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    lse: torch.Tensor,
    entropy: torch.Tensor,
    temperature: float,
    grad_hidden: torch.Tensor | None,
    grad_weight: torch.Tensor | None,
    logits: torch.Tensor | None = None,
) -> None:
    return None
