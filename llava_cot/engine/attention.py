"""The attention function that connects transformers' modelling code to the paged kernels."""

from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from llava_cot.engine.batch import Batch, Masks
from llava_cot.engine.cache import PagedLayer
from llava_cot_kernels.attention import paged_attention, shared_attention

try:
    from flash_attn import flash_attn_func  # the [flash] extra
except ImportError:
    flash_attn_func = None

NAME = "llava_cot_paged"


def paged_attention_forward(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    *,
    paged_batch: Batch,
    paged_layers: list,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of T flattened tokens: ``query`` [1, Hq, T, D] to [1, T, Hq, D]; in prefill B rows of them.

    Self-attention reads the pages, within the sliding window that the model passes on or the module has. In prefill
    all keys are at hand: see ``_attend_to_prompt``. Cross-attention reads the image store in decoding; in prefill it is
    transformers' own, over all tiles with the model's mask (the tokens before the image attend to padding tiles too).
    """
    for name in ("softcap", "s_aux"):
        if kwargs.get(name) is not None:
            kind = type(module).__name__
            raise ValueError(f"model must have attention without {name}, which the kernels lack, got {kind} with it")
    layer = paged_layers[module.layer_idx]
    window = kwargs.get("sliding_window", getattr(module, "sliding_window", None)) or 0
    if paged_batch.is_prefill:
        layer.check_unchanged(key, value)
    if paged_batch.is_prefill and not isinstance(layer, PagedLayer):
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling)
    if paged_batch.is_prefill:
        assert paged_batch.masks is not None
        return _attend_to_prompt(module, query, key, value, scaling, window, paged_batch.masks)
    rows = query[0].transpose(0, 1)  # [T, Hq, D]
    out: Any
    if isinstance(layer, PagedLayer):
        assert paged_batch.page_table is not None and paged_batch.seq_lens is not None
        out = paged_attention(
            rows,
            layer.key_cache,
            layer.value_cache,
            paged_batch.page_table,
            paged_batch.seq_lens,
            softmax_scale=scaling,
            cu_seqlens_q=paged_batch.cu_seqlens_q,
            prefix_group=paged_batch.prefix_group,
            prefix_lens=paged_batch.prefix_lens,
            window=window,
        )
    else:
        assert paged_batch.image_group is not None and paged_batch.image_cu_seqlens is not None
        out = shared_attention(
            rows,
            key[0].transpose(0, 1),
            value[0].transpose(0, 1),
            paged_batch.image_group,
            paged_batch.image_cu_seqlens,
            softmax_scale=scaling,
        )
    return out.unsqueeze(0), None


def _attend_to_prompt(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    window: int,
    masks: Masks,
) -> tuple[torch.Tensor, None]:
    """Attention of whole prompts. Without a mask of the family's own it is causal: no token sees the padding behind it.

    Causal attention is flash-attn's if that is installed, else transformers' own.
    """
    mask, length = masks[window], query.shape[2]
    if mask is None and flash_attn_func and _flash_attn_takes(query):
        packed = (query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))  # [B, T, H, D]
        seen = (window - 1, 0) if window else (-1, -1)  # keys before and behind that of the query
        return flash_attn_func(*packed, softmax_scale=scaling, causal=True, window_size=seen), None
    if mask is None and 0 < window < length:
        ones = torch.ones(1, 1, length, length, dtype=torch.bool, device=query.device)
        mask = masks[window] = ones.tril().triu(1 - window)
    return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, is_causal=mask is None)


def _flash_attn_takes(query: torch.Tensor) -> bool:
    return query.is_cuda and query.dtype in (torch.float16, torch.bfloat16)


AttentionInterface.register(NAME, paged_attention_forward)
