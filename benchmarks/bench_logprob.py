"""Time token_logprobs and linear_logprobs beside PyTorch, Liger and CCE: ``python benchmarks/bench_logprob.py``.

``python benchmarks/bench_logprob_memory.py`` measures memory.
"""

from collections.abc import Callable, Iterator
from functools import cache
from importlib import import_module
from typing import Any

import torch
from timing import Case, main
from torch import Tensor

from llava_cot_kernels.backend import available
from llava_cot_kernels.logprob import linear_logprobs, token_logprobs

TOKEN_SHAPES = [(512, 1000), (1, 128256), (64, 128256)]  # T, V: the tiny model, then Llama 3's vocabulary
LINEAR_SHAPES = {  # T, H, V: the tiny model; a 1B model; 11B, as one step of 16 candidates and as a training batch
    "cpu": [(512, 128, 1000), (512, 2048, 128256)],
    "cuda": [(512, 128, 1000), (512, 2048, 128256), (16, 4096, 128256), (2048, 4096, 128256)],
}
DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.bfloat16, torch.float32)}  # more important first
OURS = ("native", "triton", "reference")
MAX_ERROR = 1e-4  # in nats, or relative to the largest gradient; for ours in any dtype, and for peers in float32
MAX_PEER_ERROR = 0.1  # nats: the peers round 16-bit logits


def cases(device: str, report: bool) -> Iterator[Case]:
    shown = None if report else 1
    for dtype in DTYPES[device]:
        for T, V in TOKEN_SHAPES[:shown]:
            yield token_case(T, V, dtype, device)
        for T, H, V in LINEAR_SHAPES[device][:shown]:
            for backward in (False, True):
                yield linear_case(T, H, V, dtype, backward, device)


# ---- providers ----


def plain_token_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    return torch.log_softmax(logits, -1, dtype=torch.float32).gather(1, targets[:, None]).squeeze(1)


def plain_linear_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return plain_token_logprobs(hidden @ weight.T, targets)


def liger(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    function = _peer("liger_kernel.ops.fused_linear_cross_entropy").LigerFusedLinearCrossEntropyFunction
    return -function.apply(hidden, weight, targets, None, None, -100, 0.0, 0.0, "none")[0]


def liger_cute(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    module = _peer("liger_kernel.ops.fused_linear_scaled_cross_entropy")
    return -module.LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, targets)


def cut_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return -_peer("cut_cross_entropy").linear_cross_entropy(hidden, weight, targets, reduction="none")


def liger_selective(logits: Tensor, targets: Tensor) -> Tensor:
    grpo = _peer("liger_kernel.ops.grpo_loss")
    return grpo.fused_selective_log_softmax(logits.expand(1, -1, -1), targets[None], temperature=1.0)[0]


def linear_providers(device: str, dtype: torch.dtype) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    torch._dynamo.reset()  # each case is compiled for its own shapes only
    providers = {"plain": plain_linear_logprobs, "torch.compile": torch.compile(plain_linear_logprobs, dynamic=False)}
    for backend in available("linear_logprobs", device)[::-1]:
        providers[backend] = lambda *inputs, backend=backend: linear_logprobs(*inputs, backend=backend)
    if device == "cuda":
        if _peer("liger_kernel"):
            providers["Liger"] = liger
        if _peer("liger_kernel") and _peer("cutlass.cute") and dtype == torch.bfloat16:
            providers["Liger CuTe"] = liger_cute
        if _peer("cut_cross_entropy"):
            providers["cut-cross-entropy"] = cut_cross_entropy
    return providers


@cache
def _peer(module: str) -> Any:
    """Import a module, or print that it is missing and return None."""
    try:
        return import_module(module)
    except ImportError as error:
        print(f"{module} is not measured: {error}", flush=True)
        return None


# ---- cases ----


def token_case(T: int, V: int, dtype: torch.dtype, device: str) -> Case:
    logits = torch.randn(T, V, device=device).mul(3).to(dtype)
    targets = torch.randint(V, (T,), device=device)
    torch._dynamo.reset()
    providers = {"plain": plain_token_logprobs, "torch.compile": torch.compile(plain_token_logprobs, dynamic=False)}
    for backend in available("token_logprobs", device)[::-1]:
        providers[backend] = lambda *inputs, backend=backend: token_logprobs(*inputs, backend=backend)
    if device == "cuda" and _peer("liger_kernel"):
        # Liger expects one row more and ignores its logits.
        padded = torch.cat([logits, logits[:1]])
        providers["Liger"] = lambda logits, targets: liger_selective(padded, targets)
    calls = {name: lambda f=function: [f(logits, targets)] for name, function in providers.items()}
    name = f"T={T} V={V}, {_name(dtype)}"
    return Case("token_logprobs", name, calls, logits.nbytes, lambda: compare(calls, dtype))


def linear_inputs(T: int, H: int, V: int, dtype: torch.dtype, backward: bool, device: str) -> tuple[Tensor, ...]:
    hidden = torch.randn(T, H, device=device).to(dtype).requires_grad_(backward)
    weight = (torch.randn(V, H, device=device) * 3 / H**0.5).to(dtype).requires_grad_(backward)
    return hidden, weight, torch.randint(V, (T,), device=device)


def linear_case(T: int, H: int, V: int, dtype: torch.dtype, backward: bool, device: str) -> Case:
    inputs = linear_inputs(T, H, V, dtype, backward, device)
    calls = {name: linear_call(function, inputs) for name, function in linear_providers(device, dtype).items()}
    name = f"T={T} H={H} V={V}, {_name(dtype)}, forward{' and backward' if backward else ''}"
    read = inputs[0].nbytes + inputs[1].nbytes  # the backward reads it once more and writes as much
    return Case("linear_logprobs", name, calls, read * (3 if backward else 1), lambda: compare(calls, dtype))


def linear_call(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Callable[[], list[Tensor]]:
    """Return log-probs and, for inputs that need them, the gradients of their sum."""

    def call() -> list[Tensor]:
        logprobs = function(*inputs)
        if not inputs[0].requires_grad:
            return [logprobs]
        return [logprobs.detach(), *torch.autograd.grad(logprobs, inputs[:2], torch.ones_like(logprobs))]

    return call


def compare(calls: dict[str, Callable[[], list[Tensor]]], dtype: torch.dtype) -> None:
    """Check all providers against the reference: log-probs in nats, gradients relative to the largest one."""
    expected = calls["reference"]()
    for name, call in calls.items():
        for index, (actual, right) in enumerate(zip(call(), expected)):
            bound = MAX_ERROR if name in OURS or dtype == torch.float32 else MAX_PEER_ERROR
            if index > 0:
                bound = max(MAX_ERROR, 4 * torch.finfo(dtype).eps) * right.abs().max().item()
            error = (actual.float() - right.float()).abs().max().item()
            assert error <= bound, f"{name} is off by {error:.2g}, more than {bound:.2g}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    main(cases, __doc__)
