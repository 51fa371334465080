"""Attention of many candidates to shared keys: paged text, and images that are stored once."""

from itertools import pairwise

import torch
from torch import Tensor

from llava_cot_kernels.backend import OPS, choose
from llava_cot_kernels.checks import (
    FLOATS,
    USE_REFERENCE,
    Sizes,
    can_read,
    check_contiguous,
    check_finite,
    check_last_dim_contiguous,
    check_no_gradient,
    check_range,
    check_window,
)
from llava_cot_kernels.reference import attention as reference


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    *,
    softmax_scale: float,
    cu_seqlens_q: Tensor | None = None,
    prefix_group: Tensor | None = None,
    prefix_lens: Tensor | None = None,
    window: int = 0,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute causal attention of the newest queries of ``B`` sequences to their paged keys and values.

    Query ``i`` of the ``n`` queries of sequence ``b`` is at position ``p = seq_lens[b] - n + i``. Its head ``h`` reads
    key head ``h // (Hq // Hkv)``. Key ``j`` is at offset ``j % page_size`` of page ``page_table[b, j // page_size]``::

        out = sum over j <= p of softmax_j(softmax_scale * query . key_j) * value_j

    With a ``window``, only the keys ``p - window < j <= p`` count, and pages in front of them are not read.

    Args:
        query: ``[T, Hq, D]``, float32, bfloat16 or float16; ``Hq`` is a multiple of ``Hkv``.
        key_cache, value_cache: ``[num_pages, page_size, Hkv, D]`` of the same dtype, contiguous.
        page_table: int32 ``[B, P]``, padded with 0.
        seq_lens: int32 ``[B]``, the number of tokens of each sequence, including those of ``query``.
        softmax_scale: usually ``D ** -0.5``.
        cu_seqlens_q: int32 ``[B + 1]``. The queries of ``b`` are rows ``cu_seqlens_q[b]`` to ``cu_seqlens_q[b + 1]``.
            None means one query per sequence.
        prefix_group: int32 ``[B]``, the group that a sequence shares its leading pages with, or -1 for none.
        prefix_lens: int32 ``[G]``, the number of leading tokens that the members of a group share. Both are hints:
            they change the speed and never the result. Only pages that are equal in the table are read together.
        window: how many keys a query sees, its own included: ``sliding_window`` of transformers. 0 means all.
        return_lse: whether to return the logsumexp of the scaled scores too.
        backend: ``"auto"``, ``"native"``, ``"triton"`` or ``"reference"``.

    Returns:
        ``out [T, Hq, D]`` in the query's dtype. With ``return_lse`` also ``lse``, float32 ``[T, Hq]`` (natural log). A
        query that has no key, because its position is negative, gives 0 and -inf. So does one whose scores are all
        -inf. A score of NaN or +inf makes its row NaN.

    Raises:
        ValueError, TypeError: a shape, dtype or device does not fit, or (on CPU) an index is out of range. Or a query,
            key or value requires grad while gradients are recorded; only ``"reference"`` is differentiable.

    Source: PagedAttention, arXiv:2309.06180; the online softmax of FlashAttention, arXiv:2205.14135; the shared
    prefix as in Hydragen, arXiv:2402.05099; the window of Longformer, arXiv:2004.05150, section 3.1.
    """
    sizes = Sizes()
    sizes.check("query", query, "T Hq D", FLOATS)
    sizes.check("key_cache", key_cache, "num_pages page_size Hkv D", query.dtype, query.device)
    sizes.check("value_cache", value_cache, "num_pages page_size Hkv D", query.dtype, query.device)
    sizes.check("page_table", page_table, "B P", torch.int32, query.device)
    sizes.check("seq_lens", seq_lens, "B", torch.int32, query.device)
    check_last_dim_contiguous("query", query)
    check_last_dim_contiguous("page_table", page_table)
    for name, tensor in (("key_cache", key_cache), ("value_cache", value_cache), ("seq_lens", seq_lens)):
        check_contiguous(name, tensor)
    _check_heads(sizes)
    softmax_scale = check_finite("softmax_scale", softmax_scale)
    window = check_window("window", window)
    if not sizes["page_size"]:
        raise ValueError("key_cache must have page_size >= 1 in dimension 1, got 0")
    if cu_seqlens_q is None:
        if sizes["T"] != sizes["B"]:
            raise ValueError(
                f"query must have one row per sequence, B={sizes['B']}, without cu_seqlens_q, got {sizes['T']}"
            )
        cu_seqlens_q = torch.arange(sizes["B"] + 1, dtype=torch.int32, device=query.device)
    else:
        sizes.check("cu_seqlens_q", cu_seqlens_q, "_", torch.int32, query.device)
        if len(cu_seqlens_q) != sizes["B"] + 1:  # compared as a number, which a compiler may leave open
            raise ValueError(f"cu_seqlens_q must have {sizes['B'] + 1} in dimension 0, got {len(cu_seqlens_q)}")
        check_contiguous("cu_seqlens_q", cu_seqlens_q)
        _check_offsets("cu_seqlens_q", cu_seqlens_q, sizes["T"], whole=True)
    check_range("seq_lens", seq_lens, 0, sizes["P"] * sizes["page_size"] if sizes["num_pages"] else 0)
    check_range("page_table", page_table, 0, max(sizes["num_pages"] - 1, 0))
    if (prefix_group is None) != (prefix_lens is None):
        raise ValueError("prefix_group and prefix_lens must be given together, got only one of them")
    if prefix_group is not None and prefix_lens is not None:
        sizes.check("prefix_group", prefix_group, "B", torch.int32, query.device)
        sizes.check("prefix_lens", prefix_lens, "G", torch.int32, query.device)
        check_contiguous("prefix_group", prefix_group)
        check_contiguous("prefix_lens", prefix_lens)
        check_range("prefix_group", prefix_group, -1, sizes["G"] - 1)
    chosen = choose("paged_attention", query.device.type, backend)
    if chosen in OPS:
        floats = (("query", query), ("key_cache", key_cache), ("value_cache", value_cache))
        check_no_gradient(f"{chosen} paged_attention", floats, USE_REFERENCE)
        out, lse = _empty_results(query)
        OPS[chosen].paged_attention(
            query, key_cache, value_cache, page_table, seq_lens, cu_seqlens_q, prefix_group, prefix_lens,
            softmax_scale, window, out, lse,
        )  # fmt: skip
    else:
        out, lse = reference.paged_attention(
            query, key_cache, value_cache, page_table, seq_lens, cu_seqlens_q, softmax_scale, window
        )
    return (out, lse) if return_lse else out


def shared_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    group: Tensor,
    cu_seqlens_k: Tensor,
    *,
    softmax_scale: float,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute attention of ``N`` query rows to the packed keys of the image that each belongs to, without a mask.

    Row ``n`` reads the keys ``j`` from ``cu_seqlens_k[group[n]]`` to ``cu_seqlens_k[group[n] + 1]``. The rows of one
    group are stacked, in whatever order they come, so an image is read once for all of them::

        out = sum over j of softmax_j(softmax_scale * query . key_j) * value_j

    Args:
        query: ``[N, Hq, D]``, float32, bfloat16 or float16; ``Hq`` is a multiple of ``Hkv``.
        key, value: ``[S, Hkv, D]`` of the same dtype; views with a dense last dimension are read in place.
        group: int32 ``[N]``, the image of each row; -1 is an idle row.
        cu_seqlens_k: int32 or int64 ``[G + 1]``, where the keys of each image start. A group may have no rows.
        softmax_scale: usually ``D ** -0.5``.
        return_lse: whether to return the logsumexp of the scaled scores too.
        backend: ``"auto"``, ``"native"``, ``"triton"`` or ``"reference"``.

    Returns:
        ``out [N, Hq, D]`` in the query's dtype. With ``return_lse`` also ``lse``, float32 ``[N, Hq]`` (natural log). An
        idle row and a row of an empty image give 0 and -inf, as does a row whose scores are all -inf. A score of NaN or
        +inf makes its row NaN.

    Raises:
        ValueError, TypeError: a shape, dtype or device does not fit, or (on CPU) an index is out of range. Or a query,
            key or value requires grad while gradients are recorded; only ``"reference"`` is differentiable.

    Source: Hydragen's batched attention to a shared prefix, arXiv:2402.05099.
    """
    sizes = Sizes()
    sizes.check("query", query, "N Hq D", FLOATS)
    sizes.check("key", key, "S Hkv D", query.dtype, query.device)
    sizes.check("value", value, "S Hkv D", query.dtype, query.device)
    sizes.check("group", group, "N", torch.int32, query.device)
    sizes.check("cu_seqlens_k", cu_seqlens_k, "_", (torch.int32, torch.int64), query.device)
    _check_heads(sizes)
    softmax_scale = check_finite("softmax_scale", softmax_scale)
    floats = (("query", query), ("key", key), ("value", value))
    for name, tensor in floats:
        check_last_dim_contiguous(name, tensor)
    check_contiguous("group", group)
    check_contiguous("cu_seqlens_k", cu_seqlens_k)
    if not cu_seqlens_k.numel():
        raise ValueError("cu_seqlens_k must have G + 1 >= 1 entries, got 0")
    _check_offsets("cu_seqlens_k", cu_seqlens_k, sizes["S"], whole=False)
    check_range("group", group, -1, cu_seqlens_k.numel() - 2)
    chosen = choose("shared_attention", query.device.type, backend)
    if chosen in OPS:
        check_no_gradient(f"{chosen} shared_attention", floats, USE_REFERENCE)
        out, lse = _empty_results(query)
        OPS[chosen].shared_attention(query, key, value, group, cu_seqlens_k.long(), softmax_scale, out, lse)
    else:
        out, lse = reference.shared_attention(query, key, value, group, cu_seqlens_k, softmax_scale)
    return (out, lse) if return_lse else out


def _empty_results(query: Tensor) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    return out, torch.empty(query.shape[:2], dtype=torch.float32, device=query.device)


def _check_heads(sizes: Sizes) -> None:
    heads, kv_heads = sizes["Hq"], sizes["Hkv"]
    if not heads or not kv_heads or heads % kv_heads:
        raise ValueError(f"query must have a multiple of Hkv={kv_heads} heads in dimension 1, at least 1, got {heads}")
    if not sizes["D"]:
        raise ValueError("query must have D >= 1 in dimension 2, got 0")


def _check_offsets(name: str, offsets: Tensor, end: int, *, whole: bool) -> None:
    """Check that offsets do not decrease and are in ``[0, end]``. ``whole`` ones start at 0 and stop at ``end``."""
    if not can_read(offsets):
        return
    got = offsets.tolist()
    if any(begin > stop for begin, stop in pairwise(got)):
        raise ValueError(f"{name} must not decrease, got {got}")
    if whole and (got[0] != 0 or got[-1] != end):
        raise ValueError(f"{name} must start at 0 and end at {end}, got {got[0]} and {got[-1]}")
    check_range(name, offsets, 0, end)


@torch.library.register_fake("llava_cot_kernels::paged_attention")
@torch.library.register_fake("llava_cot_kernels::shared_attention")
def _(*_: object) -> None:
    return None
