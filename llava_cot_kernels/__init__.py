"""Forkable paged KV, seeded multi-candidate sampling with stop tags, and log-probs without a softmax."""

import torch  # noqa: F401  (loads the libraries that _C is linked against)

from llava_cot_kernels import _C  # noqa: F401  (registers torch.ops.llava_cot_kernels)
