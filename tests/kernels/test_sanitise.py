"""One small call of every CUDA kernel: what compute-sanitizer runs under memcheck and racecheck (.ci/gpu)."""

import pytest
import torch

from llava_cot_kernels import (
    StageTags,
    copy_pages,
    few_row_linear,
    linear_logprobs,
    paged_attention,
    sample,
    shared_attention,
    store_kv,
    token_logprobs,
)


@pytest.mark.gpu
def test_every_op_on_cuda():
    torch.manual_seed(0)
    with torch.device("cuda"):
        kv_cache = torch.randn(2, 1, 8, 4, 2, 16)
        copy_pages(kv_cache, torch.tensor([[1, 4]], dtype=torch.int32))
        key, value, query = torch.randn(3, 2, 16), torch.randn(3, 2, 16), torch.randn(3, 4, 16)
        store_kv(key, value, kv_cache[0, 0], kv_cache[1, 0], torch.tensor([5, 10, 13]))
        page_table = torch.tensor([[0, 1], [0, 2], [3, 0]], dtype=torch.int32)
        seq_lens = torch.tensor([6, 7, 2], dtype=torch.int32)
        group, prefix_lens = torch.zeros(3, dtype=torch.int32), torch.tensor([4], dtype=torch.int32)
        for window in (0, 5):
            paged_attention(
                query, kv_cache[0, 0], kv_cache[1, 0], page_table, seq_lens, softmax_scale=0.25, prefix_group=group,
                prefix_lens=prefix_lens, window=window,
            )  # fmt: skip
        shared_attention(query, key, value, group, torch.tensor([0, 3]), softmax_scale=0.25)
        logits, seed = torch.randn(3, 1003), torch.arange(3)
        tags = StageTags([b"<A>"] * 1003, ["<A>"]).to("cuda")
        for filters in ({}, {"top_k": 9}, {"top_p": 0.9, "min_p": 0.01}, {"temperature": 0.0}):
            sample(logits, seed=seed, position=1, tags=tags, **filters)
        token_logprobs(logits, seed)
        hidden, weight = torch.randn(3, 33, requires_grad=True), torch.randn(1003, 33, requires_grad=True)
        linear_logprobs(hidden, weight, seed).sum().backward()
        few_row_linear(hidden.detach(), weight.detach().to(torch.int8), torch.rand(1003))
    torch.cuda.synchronize()
