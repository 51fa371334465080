"""Inputs for the log-prob ops, what plain PyTorch makes of them, and the error it is allowed."""

import torch

from llava_cot_kernels.logprob import linear_logprobs

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def draw(generator, T, V, H, dtype, ignored=0.2):
    """Hidden states, weight and targets whose logits spread over some nats; about a fifth of the rows is ignored."""
    hidden = torch.randn(T, H, generator=generator).to(dtype)
    weight = (torch.randn(V, H, generator=generator) * 3 / max(H, 1) ** 0.5).to(dtype)
    targets = torch.randint(V, (T,), generator=generator)
    targets[torch.rand(T, generator=generator) < ignored] = -100
    return hidden, weight, targets


def linear(backend):
    """linear_logprobs by a back end, of tensors on the CPU: Triton's runs on the GPU where there is one."""
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"

    def function(hidden, weight, targets, **options):
        outputs = linear_logprobs(*(x.to(device) for x in (hidden, weight, targets)), backend=backend, **options)
        return tuple(out.cpu() for out in outputs) if isinstance(outputs, tuple) else outputs.cpu()

    return function


def plain_linear_logprobs(hidden, weight, targets, *, temperature, entropy):
    """As a model's own code has it: products in the inputs' dtype, the softmax in float32."""
    kept = targets != -100
    logprobs = torch.log_softmax((hidden @ weight.T).float() / temperature, -1)
    chosen = logprobs.gather(1, targets.clamp(min=0)[:, None]).squeeze(1)
    return chosen.where(kept, 0), (-(logprobs.exp() * logprobs).sum(-1)).where(kept, 0)


def run(function, hidden, weight, targets, temperature, grads):
    """Log-probs, entropy and the gradients of a random combination of both."""
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    outputs = function(hidden, weight, targets, temperature=temperature, entropy=True)
    gradients = torch.autograd.grad(outputs, (hidden, weight), [g.to(out.dtype) for g, out in zip(grads, outputs)])
    return *(out.detach() for out in outputs), *gradients


def assert_as_exact_as_torch(actual, plain, exact):
    """At most twice the error plain PyTorch makes in the same dtype, plus a floor of a few float32 eps."""
    assert actual.dtype == plain.dtype
    assert actual.shape == exact.shape
    if exact.numel() == 0:
        return
    floor = 4 * torch.finfo(torch.float32).eps * exact.abs().max().clamp(min=1)
    error, budget = (actual - exact).abs().max(), (plain - exact).abs().max()
    assert error <= 2 * budget + floor, f"error {error:.3g}, plain PyTorch's {budget:.3g}, floor {floor:.3g}"
