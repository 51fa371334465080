"""The output layer as a module that returns log-probs, so that [tokens, vocabulary] needs no memory of its own."""

import torch
from torch import nn

from llava_cot_kernels.logprob import linear_logprobs


class LossHead(nn.Linear):
    """An LM head whose forward returns the log-probs of targets, if they are given, instead of logits.

    This must happen in a forward: outside of one, FSDP2 holds the weight as a sharded float32 DTensor.
    """

    @classmethod
    def of(cls, lm_head: nn.Linear) -> "LossHead":
        """Make a head that shares the weight of ``lm_head``."""
        with torch.device("meta"):
            head = cls(lm_head.in_features, lm_head.out_features, bias=False)
        head.weight = lm_head.weight
        return head

    def forward(self, hidden: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        """Map ``hidden`` [..., H] to logits [..., V].

        With ``targets`` int64 [T], map ``hidden`` [T, H] to float32 log-probs [T] in nats, which are 0 at -100.
        """
        if targets is None:
            return super().forward(hidden)
        logprobs = linear_logprobs(hidden, self.weight, targets)
        assert isinstance(logprobs, torch.Tensor)
        return logprobs
