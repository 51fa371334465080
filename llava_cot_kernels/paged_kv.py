"""Writing keys and values into their pages, and copying the pages that a fork shares."""

import torch
from torch import Tensor

from llava_cot_kernels.backend import OPS, choose
from llava_cot_kernels.checks import (
    FLOATS,
    USE_REFERENCE,
    Sizes,
    can_read,
    check_apart,
    check_contiguous,
    check_last_dim_contiguous,
    check_no_gradient,
    check_range,
    check_writable,
    note_writes,
)
from llava_cot_kernels.reference import paged_kv as reference


def store_kv(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    *,
    backend: str = "auto",
) -> None:
    """Write the keys and values of ``T`` new tokens into one layer's pages, in place.

        for t in range(T):
            if slot_mapping[t] != -1:
                page, offset = divmod(slot_mapping[t], page_size)
                key_cache[page, offset], value_cache[page, offset] = key[t], value[t]

    Args:
        key, value: ``[T, Hkv, D]``, float32, bfloat16 or float16; views with a dense last dimension are read in place.
        key_cache, value_cache: ``[num_pages, page_size, Hkv, D]`` of the same dtype, contiguous, for instance
            ``kv_cache[0, layer]`` and ``kv_cache[1, layer]``.
        slot_mapping: int64 ``[T]``, page * page_size + offset; -1 is padding and writes nothing. Slots should be
            distinct. If two tokens have the same slot, either may be the one that is stored.
        backend: ``"auto"``, ``"native"`` or ``"reference"``.

    Raises:
        ValueError, TypeError: a shape, dtype or device does not fit, or (on CPU) a slot is out of range. A cache shares
            memory with the other cache, the key or the value. While gradients are recorded: a cache is a leaf that
            requires grad, or any argument requires grad; only ``"reference"`` is differentiable.

    Source: the slot mapping of vLLM, Kwon et al. 2023, arXiv:2309.06180.
    """
    sizes = Sizes()
    sizes.check("key", key, "T Hkv D", FLOATS)
    sizes.check("value", value, "T Hkv D", key.dtype, key.device)
    sizes.check("key_cache", key_cache, "num_pages page_size Hkv D", key.dtype, key.device)
    sizes.check("value_cache", value_cache, "num_pages page_size Hkv D", key.dtype, key.device)
    sizes.check("slot_mapping", slot_mapping, "T", torch.int64, key.device)
    new, caches = (("key", key), ("value", value)), (("key_cache", key_cache), ("value_cache", value_cache))
    for name, tensor in new:
        check_last_dim_contiguous(name, tensor)
    for name, tensor in (*caches, ("slot_mapping", slot_mapping)):
        check_contiguous(name, tensor)
    check_range("slot_mapping", slot_mapping, -1, sizes["num_pages"] * sizes["page_size"] - 1)
    for name, tensor in caches:
        check_writable(name, tensor)
    check_apart(caches, new)
    if choose("store_kv", key.device.type, backend) == "native":
        check_no_gradient("native store_kv", (*new, *caches), USE_REFERENCE)
        OPS["native"].store_kv(key, value, key_cache, value_cache, slot_mapping)
        note_writes(key_cache, value_cache)
    else:
        reference.store_kv(key, value, key_cache, value_cache, slot_mapping)


def copy_pages(kv_cache: Tensor, copies: Tensor, *, backend: str = "auto") -> None:
    """Copy whole pages in place, for all layers and for keys and values at once.

        for source, target in copies:
            kv_cache[:, :, target] = kv_cache[:, :, source]

    Args:
        kv_cache: ``[2, num_layers, num_pages, page_size, Hkv, D]``, float32, bfloat16 or float16, contiguous.
        copies: int32 ``[m, 2]``, pairs (source page, target page) as ``PagePool.append`` returns them, on the CPU or on
            the device of the cache. Targets must be distinct and never be sources, because the copies have no fixed
            order. A pair of equal pages copies nothing.
        backend: ``"auto"``, ``"native"`` or ``"reference"``.

    Raises:
        ValueError, TypeError: a shape, dtype or device does not fit, or (if ``copies`` is on the CPU) a page is out of
            range, or a target is another pair's too. While gradients are recorded: the cache requires grad; only
            ``"reference"`` is differentiable, and it refuses a leaf too.
    """
    sizes = Sizes()
    sizes.check("kv_cache", kv_cache, "2 num_layers num_pages page_size Hkv D", FLOATS)
    sizes.check("copies", copies, "m 2", torch.int32)
    check_contiguous("kv_cache", kv_cache)
    if copies.device.type != "cpu" and copies.device != kv_cache.device:
        raise ValueError(f"copies must be on the CPU or on {kv_cache.device}, got {copies.device}")
    check_range("copies", copies, 0, sizes["num_pages"] - 1)
    if can_read(copies):
        _check_targets(copies.tolist())
    check_writable("kv_cache", kv_cache)
    chosen = choose("copy_pages", kv_cache.device.type, backend)
    if sizes["m"] == 0:
        return
    copies = copies.to(kv_cache.device, non_blocking=True).contiguous()
    if chosen == "native":
        check_no_gradient("native copy_pages", (("kv_cache", kv_cache),), USE_REFERENCE)
        OPS["native"].copy_pages(kv_cache, copies)
        note_writes(kv_cache)
    else:
        reference.copy_pages(kv_cache, copies)


def _check_targets(pairs: list[list[int]]) -> None:
    moves = [(source, target) for source, target in pairs if source != target]
    targets = {target for _, target in moves}
    if len(targets) < len(moves) or any(source in targets for source, _ in moves):
        raise ValueError(f"copies must have distinct targets that are never sources, got {pairs}")


@torch.library.register_fake("llava_cot_kernels::store_kv")
def _(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor) -> None:
    return None


@torch.library.register_fake("llava_cot_kernels::copy_pages")
def _(kv_cache: Tensor, copies: Tensor) -> None:
    return None
