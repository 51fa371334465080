"""Writes and copies of KV pages in plain PyTorch. The arguments are those of ``llava_cot_kernels.paged_kv``."""

from torch import Tensor


def store_kv(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor) -> None:
    kept = slot_mapping != -1
    slots = slot_mapping[kept]
    key_cache.flatten(0, 1)[slots] = key[kept]
    value_cache.flatten(0, 1)[slots] = value[kept]


def copy_pages(kv_cache: Tensor, copies: Tensor) -> None:
    source, target = copies.long().unbind(1)
    kv_cache[:, :, target] = kv_cache[:, :, source]
