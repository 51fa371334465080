"""Log-probs of given tokens in plain PyTorch, from logits or from hidden states. It materialises [T, V].

Everything is computed in float32 for every input dtype, except that float64 stays float64 for gradcheck.
"""

import torch

IGNORE_INDEX = -100
"""The target that leaves a row out. The row takes part in no arithmetic; its log-prob is 0 and it has no gradient."""


def token_logprobs(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return ``log_softmax(logits)[t, targets[t]]``: logits [T, V], targets int64 [T] -> [T]."""
    kept = targets != IGNORE_INDEX
    logprobs = torch.log_softmax(_widen(logits[kept]), dim=-1)
    return _scatter(kept, _pick(logprobs, targets[kept]))


def linear_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Return ``log_softmax(hidden @ weight.T / temperature)`` at the targets: [T, H] x [V, H] -> [T].

    With ``entropy`` also return the entropy [T] of the distribution.
    """
    kept = targets != IGNORE_INDEX
    logits = _widen(hidden[kept]) @ _widen(weight).T / temperature
    logprobs = torch.log_softmax(logits, dim=-1)
    chosen = _scatter(kept, _pick(logprobs, targets[kept]))
    if not entropy:
        return chosen
    probs = logprobs.exp()
    surprisal = -logprobs.masked_fill(probs == 0, 0)  # a masked token adds 0 to the entropy, not 0 * inf
    return chosen, _scatter(kept, (probs * surprisal).sum(dim=-1))


def _widen(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _pick(logprobs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return logprobs.gather(1, targets[:, None]).squeeze(1)


def _scatter(kept: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return values.new_zeros(kept.shape).masked_scatter(kept, values)
