"""Forkable paged KV, seeded multi-candidate sampling with stop tags, and log-probs without a softmax."""

import torch  # noqa: F401  (loads the libraries that _C is linked against)

from llava_cot_kernels import _C  # noqa: F401  (registers torch.ops.llava_cot_kernels)
from llava_cot_kernels.attention import paged_attention, shared_attention
from llava_cot_kernels.logprob import linear_logprobs, token_logprobs
from llava_cot_kernels.page_pool import OutOfPages, PagePool
from llava_cot_kernels.paged_kv import copy_pages, store_kv
from llava_cot_kernels.sampling import SampleOutput, sample
from llava_cot_kernels.stage_tags import StageTags

__all__ = [
    "OutOfPages",
    "PagePool",
    "SampleOutput",
    "StageTags",
    "copy_pages",
    "linear_logprobs",
    "paged_attention",
    "sample",
    "shared_attention",
    "store_kv",
    "token_logprobs",
]
