"""Paged and shared attention in Triton.

Queries that read the same keys are stacked into one tile. These are the candidates of a group over the pages that they
share, the rows of an image over its keys, or the queries of a chunk over their own sequence. A row of a tile is a
(query, query head) pair of one key head. The keys are cut into splits. A program attends with one tile to one split.
``merge`` folds the states of a row's splits in the order of the keys.

With a window a tile begins at the first split that one of its rows sees, and a row has states for as many splits as
its window may touch. So neither programs nor scratch grow with the length of a sequence.

There are at most three launches: ``group_queries`` (which queries are stacked), ``attend`` and ``merge``. Without
groups there are two. If there are enough programs without splits, each program walks through all splits of its tile,
and there is one launch.

Splits of an image depend on the image alone. The length of a split of paged keys depends on the shape of a call: with
few programs it is short, so that a single sequence keeps many multiprocessors busy. Blocks within a split and the order
in which states are folded are fixed. The shape of a tile depends only on dtype, heads and head dim. Rows of a tile
never mix. So slot, group, hints and the number of launches do not change a bit of the result. Neither does the batch,
if the splits have the same length. Nothing is read back to the host. Grids, splits and scratch depend only on shapes,
so a captured graph can be replayed with other values.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from llava_cot_kernels.triton.attention_tile import fold, run_tile, store_result, tile_shape

SPLIT_KEYS = (256, 128, 64)  # of a split of paged keys, which starts at each multiple: the first with enough programs
IMAGE_SPLITS = 16  # at most; with 8 key heads, about one program for each of the 132 multiprocessors of an H200
IMAGE_SPLIT_KEYS = 128  # the least keys of a split

# From these numbers on (sequences per group, tokens that the page table has room for), grouping is worth its launch.
# This is NOT YET MEASURED on a GPU with these kernels. A launch takes about 2 us, in which an H200 reads 8 MB: 2,048
# tokens of 8 key heads x 128 in bfloat16. N sequences save (N - 1) * prefix tokens. The numbers are rounded up, since
# published break-even points are higher. TensorRT-LLM #14396 loses at 128 tokens and wins 2.2x at 256 (128 beams, L20).
# FlashInfer #595 loses at 8 x 4,000 with one key head and wins 2x with eight. vLLM requires 8 requests and 256 tokens.
SHARING_PAYS = ((2, 4096), (4, 1024), (8, 512), (16, 256))
FILLING_PROGRAMS = 132  # one for each multiprocessor of an H200; on every GPU, so that bits do not depend on it
ENOUGH_PROGRAMS = 2 * 132  # this many keep an H200 busy without splits
MAX_SCRATCH_BYTES = 256 << 20  # above it a program walks through the splits of its tile
MERGE_VALUES = 512  # values that a program merges, in 16 registers of each thread

_SCAN = tl.constexpr(128)  # entries of an index that a program reads at once
_STATES = tl.constexpr(8)  # splits whose states a program reads at once


@triton.jit
def _segment_of(starts, num_segments, at, QUERIES: tl.constexpr):
    """Find the segment of query ``at``, or, with ``QUERIES`` to a tile, of the tile in slot ``at``.

    Segment ``i`` has the slots from ``starts[i] // QUERIES + i`` on. That leaves room for its last, partly filled tile
    without reading the sizes of other segments. Some slots are empty: their first query is past the segment's end.
    """
    found = 0
    for first in range(0, num_segments, _SCAN):
        index = first + tl.arange(0, _SCAN)
        start = tl.load(starts + index, mask=index < num_segments, other=0)
        if QUERIES:
            start = start // QUERIES + index
        found += tl.sum(((index < num_segments) & (start <= at)).to(tl.int32))
    return found - 1


@triton.jit
def _image_split(num_keys, IMAGE_SPLITS: tl.constexpr, IMAGE_SPLIT_KEYS: tl.constexpr):
    """Return the keys per split of an image: a multiple of 64 that needs at most ``IMAGE_SPLITS`` splits."""
    return tl.maximum(tl.cdiv(num_keys, IMAGE_SPLITS * 64) * 64, IMAGE_SPLIT_KEYS)


@triton.jit(
    do_not_specialize=[
        "num_sequences", "num_groups", "num_group_slots", "num_states", "num_rows", "table_stride", "window",
        "split_keys",
    ]
)  # fmt: skip
def _attend_paged(
    query, key_cache, value_cache, page_table, seq_lens, cu_seqlens_q, out, lse, max_states, sum_states, total_states,
    order, order_sequence, group_starts, leaders, shared_lens,
    num_sequences, num_groups, num_group_slots, num_states, num_rows, query_stride, query_head_stride, table_stride,
    softmax_scale, window, split_keys,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr,
    GROUPED: tl.constexpr, WALK: tl.constexpr, WINDOWED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Attend to paged keys. Grid: tiles (those of groups, then those of single sequences), key heads, splits."""
    QUERIES: tl.constexpr = BLOCK_M // HEADS  # in a tile
    slot = tl.program_id(0)
    in_group = False
    starts, num_segments = cu_seqlens_q, num_sequences
    if GROUPED:
        in_group = slot < num_group_slots
        if in_group:
            starts, num_segments = group_starts, num_groups + 1
        else:
            slot -= num_group_slots
    segment = _segment_of(starts, num_segments, slot, QUERIES)
    begin, stop = tl.load(starts + segment), tl.load(starts + segment + 1)
    query_in_tile = tl.arange(0, BLOCK_M) // HEADS
    token = begin + (slot - begin // QUERIES - segment) * QUERIES + query_in_tile
    valid = (query_in_tile < QUERIES) & (token < stop)
    sequence = tl.zeros([BLOCK_M], tl.int32) + segment
    owner = segment  # whose pages the tile reads
    if GROUPED:
        listed = valid & (token < tl.where(in_group, stop, 0))  # tokens are positions in the order of the groups
        sequence = tl.load(order_sequence + token, mask=listed, other=segment)
        token = tl.where(listed, tl.load(order + token, mask=listed, other=0), token)
        if in_group:
            owner = tl.load(leaders + segment)
        # A row is computed in its group's tile for the splits that it shares, and in its sequence's for all others.
        shared = tl.load(shared_lens + sequence, mask=valid, other=0)
        if not WINDOWED:
            first_key = tl.program_id(2) * split_keys
            valid &= tl.where(in_group, first_key < shared, first_key >= shared)
    after = tl.load(cu_seqlens_q + sequence + 1, mask=valid, other=0) - token
    limit = tl.where(valid, tl.load(seq_lens + sequence, mask=valid, other=0) - after + 1, 0)
    first = limit  # a placeholder: not read without a window
    if WINDOWED:
        first = tl.maximum(limit - window, 0)
        if GROUPED:
            first = tl.where(in_group, first, tl.maximum(first, shared))
            limit = tl.where(in_group, tl.minimum(limit, shared), limit)
        sees = first < limit
        first, limit = tl.where(sees, first, 0x7FFFFFFF), tl.where(sees, limit, 0)
    stride = tl.num_programs(1) * HEAD_DIM
    run_tile(
        query, key_cache, value_cache, out, lse, max_states, sum_states, total_states,
        query_stride, query_head_stride, stride, HEAD_DIM, stride, HEAD_DIM,
        page_table + owner.to(tl.int64) * table_stride, 0, token, valid, first, limit,
        split_keys, num_states, num_rows, softmax_scale,
        HEADS, HEAD_DIM, PAGE_SIZE, WALK, WINDOWED, BLOCK_M, BLOCK_N, BLOCK_D, INTERPRETED,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_queries", "num_groups", "num_rows"])
def _attend_image(
    query, key, value, group, cu_seqlens_k, out, lse, max_states, sum_states, total_states, order, group_starts,
    num_queries, num_groups, num_rows, query_stride, query_head_stride,
    key_stride, key_head_stride, value_stride, value_head_stride, softmax_scale,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, IMAGE_SPLITS: tl.constexpr, IMAGE_SPLIT_KEYS: tl.constexpr,
    GROUPED: tl.constexpr, WALK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Attend to images. Grid: tiles of an image's rows, key heads, splits. With one image the rows are not sorted."""
    QUERIES: tl.constexpr = BLOCK_M // HEADS  # in a tile
    slot = tl.program_id(0)
    query_in_tile = tl.arange(0, BLOCK_M) // HEADS
    image = 0
    token = slot * QUERIES + query_in_tile
    stop = num_queries
    if GROUPED:
        image = _segment_of(group_starts, num_groups + 1, slot, QUERIES)
        begin, stop = tl.load(group_starts + image), tl.load(group_starts + image + 1)
        token = begin + (slot - begin // QUERIES - image) * QUERIES + query_in_tile
    valid = (query_in_tile < QUERIES) & (token < stop)
    if GROUPED:
        token = tl.load(order + token, mask=valid, other=0)
    seeing = valid & (tl.load(group + token, mask=valid, other=-1) == image)  # false for idle rows
    real = image < num_groups
    first_token = tl.load(cu_seqlens_k + image, mask=real, other=0)
    num_keys = (tl.load(cu_seqlens_k + image + 1, mask=real, other=0) - first_token).to(tl.int32)
    run_tile(
        query, key, value, out, lse, max_states, sum_states, total_states,
        query_stride, query_head_stride, key_stride, key_head_stride, value_stride, value_head_stride,
        group, first_token, token, valid, token, tl.where(seeing, num_keys, 0),
        _image_split(num_keys, IMAGE_SPLITS, IMAGE_SPLIT_KEYS), 0, num_rows, softmax_scale,
        HEADS, HEAD_DIM, 0, WALK, False, BLOCK_M, BLOCK_N, BLOCK_D, INTERPRETED,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_segments", "num_states", "num_rows", "window", "split_keys"])
def _merge(
    max_states, sum_states, total_states, lens, starts, group, out, lse, num_segments, num_states, num_rows, window,
    split_keys, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PAGED: tl.constexpr, WINDOWED: tl.constexpr,
    IMAGE_SPLITS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Fold the states of a row's splits in the order of the keys. Grid: queries, key heads, blocks of query heads.

    The loads of ``_STATES`` splits do not wait for each other. Folding what is behind the last split changes nothing.
    """
    token = tl.program_id(0)
    if PAGED:
        sequence = _segment_of(starts, num_segments, token, 0)
        limit = tl.load(lens + sequence) - tl.load(starts + sequence + 1) + token + 1
    else:
        image = tl.load(group + token)
        real = (image >= 0) & (image < num_segments)
        limit = (tl.load(lens + image + 1, mask=real, other=0) - tl.load(lens + image, mask=real, other=0)).to(tl.int32)
        split_keys = _image_split(limit, IMAGE_SPLITS, split_keys)
    head, dims = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D)
    if BLOCK_H < HEADS:
        head += tl.program_id(2) * BLOCK_H
    row = (token.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * HEADS + head
    row_max = tl.full([BLOCK_H], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_H], tl.float32)
    total = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
    begin = 0
    if WINDOWED:
        begin = tl.maximum(limit - window, 0) // split_keys
    stop = tl.cdiv(tl.maximum(limit, 0), split_keys)
    for first in range(begin, stop, _STATES):
        for i in tl.static_range(_STATES):
            split = first + i
            slot = split
            if WINDOWED:
                slot = split % num_states
            state = slot * num_rows.to(tl.int64) + row
            known = head < tl.where(split < stop, HEADS, 0)
            inside = known[:, None] & (dims < HEAD_DIM)[None, :]
            row_max, row_sum, total = fold(
                row_max, row_sum, total,
                tl.load(max_states + state, mask=known, other=float("-inf")),
                tl.load(sum_states + state, mask=known, other=0.0),
                tl.load(total_states + state[:, None] * HEAD_DIM + dims[None, :], mask=inside, other=-0.0),
            )  # fmt: skip
    store_result(row_max, row_sum, total, out, lse, row, head < HEADS, HEAD_DIM, BLOCK_D, INTERPRETED)


@triton.jit(do_not_specialize=["num_sequences", "num_groups", "table_stride", "split_keys"])
def _group_queries(
    group, cu_seqlens_q, order, group_starts, order_sequence, leaders, shared_lens, prefix_lens, page_table, seq_lens,
    num_sequences, num_groups, table_stride, split_keys,
    PAGE_SIZE: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """Sort queries by group and keep their order within a group. Group ``num_groups`` has all queries without one.

    Program ``i`` places the queries of sequence ``i`` in ``order`` and finds where group ``i`` starts there. For pages
    it also finds how many leading tokens the sequence shares with the first member of its group. If ``WINDOWED``, a
    sequence shares its whole prefix, with all of its queries behind it, or nothing: then the rows of a group's tile see
    no more splits than those of any other.
    """
    i = tl.program_id(0)
    own = tl.load(group + i, mask=i < num_sequences, other=-1)
    own = tl.where((own >= 0) & (own < num_groups), own, num_groups)
    group_start, place, leader = 0, 0, num_sequences
    for first in range(0, num_sequences, _SCAN):
        index = first + tl.arange(0, _SCAN)
        inside = index < num_sequences
        other = tl.load(group + index, mask=inside, other=-1)
        other = tl.where((other >= 0) & (other < num_groups), other, num_groups)
        count = inside.to(tl.int32)
        if PAGE_SIZE:
            begins = tl.load(cu_seqlens_q + index, mask=inside, other=0)
            count = tl.load(cu_seqlens_q + index + 1, mask=inside, other=0) - begins
        group_start += tl.sum(tl.where(other < i, count, 0))
        place += tl.sum(tl.where((other < own) | ((other == own) & (index < i)), count, 0))
        leader = tl.minimum(leader, tl.min(tl.where(inside & (other == own), index, num_sequences)))
    tl.store(group_starts + i, group_start, mask=i < num_groups + 2)
    if i < num_sequences:
        if PAGE_SIZE:
            begin, end = tl.load(cu_seqlens_q + i), tl.load(cu_seqlens_q + i + 1)
            for first in range(begin, end, _SCAN):
                token = first + tl.arange(0, _SCAN)
                tl.store(order + place + token - begin, token, mask=token < end)
                tl.store(order_sequence + place + token - begin, token * 0 + i, mask=token < end)
            whole = tl.load(prefix_lens + own, mask=own < num_groups, other=0)
            length = tl.load(seq_lens + i)
            prefix = tl.maximum(tl.minimum(whole, length), 0)
            same = tl.cdiv(prefix, PAGE_SIZE)
            for first in range(0, tl.cdiv(prefix, PAGE_SIZE), _SCAN):
                index = first + tl.arange(0, _SCAN)
                inside = index < same
                mine = tl.load(page_table + i.to(tl.int64) * table_stride + index, mask=inside, other=0)
                theirs = tl.load(page_table + leader.to(tl.int64) * table_stride + index, mask=inside, other=0)
                same = tl.minimum(same, tl.min(tl.where(inside & (mine != theirs), index, same)))
            shared = tl.minimum(prefix, same * PAGE_SIZE) // split_keys * split_keys
            if WINDOWED:
                is_whole = shared == whole // split_keys * split_keys
                shared = tl.where(is_whole & (shared <= length - end + begin), shared, 0)
            tl.store(shared_lens + i, shared)
            tl.store(leaders + own, leader, mask=leader == i)
        else:
            tl.store(order + place, i)


@torch.library.custom_op("llava_cot_kernels_triton::paged_attention", mutates_args=("out", "lse"))
def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    prefix_group: Tensor | None,
    prefix_lens: Tensor | None,
    softmax_scale: float,
    window: int,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Run ``llava_cot_kernels::paged_attention``. A prefix is shared in whole splits."""
    if not query.numel():
        return
    num_queries, num_sequences = query.shape[0], seq_lens.shape[0]
    page_size, kv_heads = key_cache.shape[1:3]
    shape = tile_shape(query, kv_heads)
    num_full_tiles = num_queries // (shape["BLOCK_M"] // shape["HEADS"])
    num_slots, num_group_slots = num_full_tiles + num_sequences, 0
    max_keys = page_table.shape[1] * page_size
    window = window if window < max_keys else 0
    seen_keys = window or max_keys  # by one query
    split_keys = choose_split(num_slots * kv_heads, seen_keys)
    num_splits = max(1, triton.cdiv(seen_keys, split_keys))
    num_states = num_programs = num_splits
    if window:  # it begins and ends within splits, that of a tile later than that of its first query
        num_states = triton.cdiv(window - 1, split_keys) + 1
        num_programs = triton.cdiv(window + shape["BLOCK_M"] // shape["HEADS"] - 2, split_keys) + 1
    num_groups = 0 if prefix_lens is None else prefix_lens.shape[0]
    grouped = sharing_pays(num_sequences, num_groups, seen_keys) and _fits(num_states, query)
    walk = not grouped and _walks(num_splits, num_slots * kv_heads, query)
    order = group_starts = order_sequence = leaders = shared_lens = seq_lens  # a placeholder: not read without groups
    with torch.cuda.device_of(query):
        if grouped:
            num_group_slots = num_full_tiles + num_groups + 1
            order, order_sequence = seq_lens.new_empty(2, num_queries)
            group_starts, leaders = seq_lens.new_empty(num_groups + 2), seq_lens.new_empty(num_groups + 1)
            shared_lens = torch.empty_like(seq_lens)
            _group_queries[(max(num_sequences, num_groups + 2),)](
                prefix_group, cu_seqlens_q, order, group_starts, order_sequence, leaders, shared_lens,
                prefix_lens, page_table, seq_lens, num_sequences, num_groups, page_table.stride(0),
                split_keys, page_size, window > 0, num_warps=1,
            )  # fmt: skip
        states = _new_states(query, 0 if walk else num_states)
        _attend_paged[(num_group_slots + num_slots, kv_heads, 1 if walk else num_programs)](
            query, key_cache, value_cache, page_table, seq_lens, cu_seqlens_q, out, lse, *states,
            order, order_sequence, group_starts, leaders, shared_lens,
            num_sequences, num_groups, num_group_slots, num_states, lse.numel(), query.stride(0), query.stride(1),
            page_table.stride(0), softmax_scale, window, split_keys=split_keys,
            PAGE_SIZE=page_size, GROUPED=grouped, WALK=walk, WINDOWED=window > 0, **shape,
        )  # fmt: skip
        if not walk:
            merge = _merge_shape(shape)
            _merge[(num_queries, kv_heads, triton.cdiv(merge["HEADS"], merge["BLOCK_H"]))](
                *states, seq_lens, cu_seqlens_q, seq_lens, out, lse, num_sequences, num_states, lse.numel(), window,
                split_keys, PAGED=True, WINDOWED=window > 0, IMAGE_SPLITS=0, **merge,
            )  # fmt: skip


@torch.library.custom_op("llava_cot_kernels_triton::shared_attention", mutates_args=("out", "lse"))
def shared_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    group: Tensor,
    cu_seqlens_k: Tensor,
    softmax_scale: float,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Run ``llava_cot_kernels::shared_attention``. An image is read once for each tile of its rows."""
    if not query.numel():
        return
    num_queries, num_groups, kv_heads = query.shape[0], cu_seqlens_k.shape[0] - 1, key.shape[1]
    shape = tile_shape(query, kv_heads)
    queries_per_tile = shape["BLOCK_M"] // shape["HEADS"]
    grouped = num_groups > 1
    num_slots = triton.cdiv(num_queries, queries_per_tile)
    if grouped:
        num_slots = num_queries // queries_per_tile + num_groups + 1
    num_splits = max(1, min(IMAGE_SPLITS, triton.cdiv(key.shape[0], IMAGE_SPLIT_KEYS)))
    walk = _walks(num_splits, num_slots * kv_heads, query)
    order = group_starts = group  # a placeholder: not read without groups
    with torch.cuda.device_of(query):
        if grouped:
            order, group_starts = torch.empty_like(group), group.new_empty(num_groups + 2)
            _group_queries[(max(num_queries, num_groups + 2),)](
                group, group, order, group_starts, *[group] * 6, num_queries, num_groups, 0, 1, 0, False, num_warps=1
            )
        states = _new_states(query, 0 if walk else num_splits)
        _attend_image[(num_slots, kv_heads, 1 if walk else num_splits)](
            query, key, value, group, cu_seqlens_k, out, lse, *states, order, group_starts,
            num_queries, num_groups, lse.numel(), query.stride(0), query.stride(1),
            key.stride(0), key.stride(1), value.stride(0), value.stride(1), softmax_scale,
            IMAGE_SPLITS=IMAGE_SPLITS, IMAGE_SPLIT_KEYS=IMAGE_SPLIT_KEYS, GROUPED=grouped, WALK=walk, **shape,
        )  # fmt: skip
        if not walk:
            merge = _merge_shape(shape)
            _merge[(num_queries, kv_heads, triton.cdiv(merge["HEADS"], merge["BLOCK_H"]))](
                *states, cu_seqlens_k, cu_seqlens_k, group, out, lse, num_groups, 0, lse.numel(), 0,
                IMAGE_SPLIT_KEYS, PAGED=False, WINDOWED=False, IMAGE_SPLITS=IMAGE_SPLITS, **merge,
            )  # fmt: skip


@paged_attention.register_fake
@shared_attention.register_fake
def _(*_) -> None:
    return None


def choose_split(num_programs: int, seen_keys: int) -> int:
    """Return the most keys of a split with which ``num_programs`` for each split fill a GPU, else the fewest.

    It depends on nothing but shapes. Groups are not counted: a hint, which may be wrong, must not change the result.
    """
    enough = (keys for keys in SPLIT_KEYS if num_programs * triton.cdiv(seen_keys, keys) >= FILLING_PROGRAMS)
    return next(enough, SPLIT_KEYS[-1])


def sharing_pays(num_sequences: int, num_groups: int, max_keys: int) -> bool:
    """Return whether stacking is worth a launch by ``SHARING_PAYS``. Only shapes count: reading a value would wait."""
    if not num_groups:
        return False
    return any(num_sequences >= members * num_groups and max_keys >= keys for members, keys in SHARING_PAYS)


def _walks(num_splits: int, num_programs: int, query: Tensor) -> bool:
    """Return whether a program walks through the splits of its tile. It then needs no scratch and no merge."""
    return num_splits == 1 or num_programs >= ENOUGH_PROGRAMS or not _fits(num_splits, query)


def _fits(num_splits: int, query: Tensor) -> bool:
    return 4 * num_splits * query.numel() <= MAX_SCRATCH_BYTES


def _new_states(query: Tensor, num_splits: int) -> list[Tensor]:
    """Allocate, for each split and row, the max and sum of the weights and the sum of the weighted values."""
    rows = [num_splits, *query.shape[:2]]
    return [query.new_empty(size, dtype=torch.float32) for size in (rows, rows, [*rows, query.shape[2]])]


def _merge_shape(shape: dict[str, Any]) -> dict[str, Any]:
    """Return the constants of ``_merge``: one warp, and as many heads as keep ``MERGE_VALUES`` in registers."""
    kept = {name: shape[name] for name in ("HEADS", "HEAD_DIM", "BLOCK_D", "INTERPRETED")}
    heads = min(triton.next_power_of_2(shape["HEADS"]), max(1, MERGE_VALUES // shape["BLOCK_D"]))
    return {**kept, "BLOCK_H": heads, "num_warps": 1}
