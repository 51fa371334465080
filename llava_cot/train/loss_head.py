"""The output layer as a module that returns log-probs, so that no [tokens, vocabulary] tensor is ever made."""

import torch
from torch import nn

from llava_cot_kernels.logprob import linear_logprobs


class LossHead(nn.Linear):
    """An LM head whose forward, given targets, returns their log-probs instead of logits.

    It must be a forward: outside of one, FSDP2 holds this weight as a sharded float32 DTensor.
    """

    @classmethod
    def of(cls, lm_head: nn.Linear) -> "LossHead":
        """The head with the weight of ``lm_head``, which it shares."""
        with torch.device("meta"):
            head = cls(lm_head.in_features, lm_head.out_features, bias=False)
        head.weight = lm_head.weight
        return head

    def forward(self, hidden: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        """``hidden`` [..., H] to logits [..., V]; [T, H] with ``targets`` int64 [T] to float32 log-probs, 0 at -100."""
        if targets is None:
            return super().forward(hidden)
        logprobs = linear_logprobs(hidden, self.weight, targets)
        assert isinstance(logprobs, torch.Tensor)
        return logprobs
