"""token_logprobs and linear_logprobs, reference beside native: ``python benchmarks/bench_logprob.py [--report]``."""

import argparse
from collections.abc import Callable

import torch
from timing import Quantiles, environment, measure, table

from llava_cot_kernels.backend import available
from llava_cot_kernels.logprob import linear_logprobs, token_logprobs

BF16, FP32 = torch.bfloat16, torch.float32
# [T, V] and [T, H] x [V, H]: the tiny model; one and 64 rows of Llama 3's vocabulary; a reduced 3B's output layer.
TOKEN_SHAPES = [(512, 1000), (1, 128256), (64, 128256)]
LINEAR_SHAPES = [(512, 128, 1000), (16, 2048, 32000), (128, 2048, 32000)]
MAX_ERROR = 1e-4  # nats, and relative to the largest gradient


def compare(name: str, call: Callable[[str], list[torch.Tensor]], providers, repeats) -> tuple[str, list[Quantiles]]:
    """Check that all providers agree, then time each."""
    expected = call(providers[0])
    for provider in providers[1:]:
        for actual, right in zip(call(provider), expected):
            # Gradients are rounded to the inputs' dtype: one step of it is allowed, of the largest value.
            scale = max(1.0, right.abs().max().item())
            bound = (MAX_ERROR if right.dtype == FP32 else torch.finfo(right.dtype).eps) * scale
            error = (actual.float() - right.float()).abs().max().item()
            assert error <= bound, f"{name}: {provider} is off by {error:.2g}, more than {bound:.2g}"
    return name, [measure(lambda provider=provider: call(provider), repeats) for provider in providers]


def token_case(T: int, V: int, dtype: torch.dtype, device: str):
    logits = torch.randn(T, V, device=device).mul(3).to(dtype)
    targets = torch.randint(V, (T,), device=device)
    return f"T={T} V={V} {_name(dtype)}", lambda backend: [token_logprobs(logits, targets, backend=backend)]


def linear_case(T: int, H: int, V: int, dtype: torch.dtype, backward: bool, device: str):
    hidden = torch.randn(T, H, device=device).to(dtype).requires_grad_(backward)
    weight = (torch.randn(V, H, device=device) * 3 / H**0.5).to(dtype).requires_grad_(backward)
    targets = torch.randint(V, (T,), device=device)

    def call(backend: str) -> list[torch.Tensor]:
        logprobs = linear_logprobs(hidden, weight, targets, backend=backend)
        if not backward:
            return [logprobs]
        return [logprobs.detach(), *torch.autograd.grad(logprobs.sum(), (hidden, weight))]

    return f"T={T} H={H} V={V} {_name(dtype)}{' + backward' if backward else ''}", call


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--report", action="store_true", help="all shapes; without it the first of each op")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    token_shapes, linear_shapes = (s if args.report else s[:1] for s in (TOKEN_SHAPES, LINEAR_SHAPES))
    token = [(shape, dtype) for shape in token_shapes for dtype in (FP32, BF16)]
    linear = [(shape, dtype, b) for shape in linear_shapes for dtype in (FP32, BF16) for b in (False, True)]
    cases = {
        "token_logprobs": (token_case(*shape, dtype, args.device) for shape, dtype in token),
        "linear_logprobs": (linear_case(*shape, dtype, b, args.device) for shape, dtype, b in linear),
    }
    print(environment())
    for op, generated in cases.items():
        providers = available(op, args.device)[::-1]
        rows = [compare(name, call, providers, args.repeats) for name, call in generated]
        print(f"\n{table(op, providers, rows)}")


if __name__ == "__main__":
    main()
