"""Paged and shared attention in plain PyTorch. The arguments are those of ``llava_cot_kernels.attention``.

Everything is computed in float32 (in float64 for float64 inputs), one sequence or image at a time.
"""

import torch
from torch import Tensor


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    softmax_scale: float,
    window: int = 0,
) -> tuple[Tensor, Tensor]:
    page_size = key_cache.shape[1]
    out, lse = _empty_results(query)
    starts = cu_seqlens_q.tolist()
    for sequence, (seq_len, begin, end) in enumerate(zip(seq_lens.tolist(), starts, starts[1:])):
        pages = page_table[sequence, : -(-seq_len // page_size)].long()
        position = torch.arange(seq_len - (end - begin), seq_len, device=query.device)
        first = max(0, seq_len - (end - begin) - window + 1) if window else 0  # that the first query sees
        key = key_cache[pages].flatten(0, 1)[first:seq_len]  # [seq_len - first, Hkv, D]
        value = value_cache[pages].flatten(0, 1)[first:seq_len]
        index = torch.arange(first, seq_len, device=query.device)
        visible = index <= position[:, None]  # [n, seq_len - first]
        if window:
            visible &= index > position[:, None] - window
        out[begin:end], lse[begin:end] = _attend(query[begin:end], key, value, visible, softmax_scale)
    return out, lse


def shared_attention(
    query: Tensor, key: Tensor, value: Tensor, group: Tensor, cu_seqlens_k: Tensor, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    out, lse = _empty_results(query)
    rows_of: dict[int, list[int]] = {}
    for row, image in enumerate(group.tolist()):
        rows_of.setdefault(image, []).append(row)
    idle = rows_of.pop(-1, [])
    out[idle] = 0
    lse[idle] = -torch.inf
    starts = cu_seqlens_k.tolist()
    for image, rows in rows_of.items():
        keys = slice(starts[image], starts[image + 1])
        visible = torch.ones(1, keys.stop - keys.start, dtype=torch.bool, device=query.device)
        out[rows], lse[rows] = _attend(query[rows], key[keys], value[keys], visible, softmax_scale)
    return out, lse


def _empty_results(query: Tensor) -> tuple[Tensor, Tensor]:
    lse_dtype = torch.promote_types(query.dtype, torch.float32)
    return torch.empty_like(query), query.new_empty(query.shape[:2], dtype=lse_dtype)


def _attend(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, softmax_scale: float) -> tuple[Tensor, Tensor]:
    """Attend with queries ``[n, Hq, D]`` to keys and values ``[s, Hkv, D]`` under a mask ``[n or 1, s]``.

    Returns ``out [n, Hq, D]`` and ``lse [n, Hq]``.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    grouped = query.to(dtype).unflatten(1, (key.shape[1], -1))  # [n, Hkv, Hq // Hkv, D]
    scores = torch.einsum("nhgd,shd->nhgs", grouped, key.to(dtype)) * softmax_scale
    visible = visible[:, None, None, :]
    scores = scores.masked_fill(~visible, -torch.inf)
    weights = scores.softmax(-1).masked_fill(
        scores.isneginf(), 0
    )  # softmax gives NaN for a row without keys; must be 0
    out = torch.einsum("nhgs,shd->nhgd", weights, value.to(dtype))
    lse = scores.logsumexp(-1)
    lse = lse.masked_fill(lse.isposinf(), torch.nan)  # as its weights
    return out.flatten(1, 2).to(query.dtype), lse.flatten(1, 2)
