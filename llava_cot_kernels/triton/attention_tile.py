"""The work of a tile of query rows: from the keys of its splits to states, and from states to rows of ``out``."""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from llava_cot_kernels.triton.dot import dot

INTERPRETED = triton.knobs.runtime.interpret


class Tile(NamedTuple):
    rows: int
    keys: int
    num_warps: int
    num_stages: int


# The tile for (bytes of an element, largest head_dim). In 16 bits, 64 rows are one matrix instruction of Hopper, and 16
# candidates of 4 heads. A single sequence leaves rows empty, which costs nothing while reading keys takes the time.
# A program that walks holds two sets of sums. With so many warps, or so few rows, threads hardly spill.
TILES = {
    (2, 64): Tile(64, 64, 8, 3),
    (2, 128): Tile(64, 64, 8, 3),
    (2, 256): Tile(32, 32, 8, 3),
    (2, 1 << 30): Tile(16, 16, 4, 2),
    (4, 256): Tile(16, 16, 4, 2),
    (4, 1 << 30): Tile(16, 16, 8, 2),
}


def tile_shape(query: Tensor, kv_heads: int) -> dict[str, Any]:
    """Return the constants that the attend kernels are compiled for."""
    heads, head_dim = query.shape[1] // kv_heads, query.shape[2]
    tile = next(tile for (size, dim), tile in TILES.items() if size == query.element_size() and head_dim <= dim)
    rows = max(tile.rows, triton.next_power_of_2(heads))
    return {
        "HEADS": heads,
        "HEAD_DIM": head_dim,
        "BLOCK_M": rows,
        "BLOCK_N": tile.keys,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "INTERPRETED": INTERPRETED,
        "num_warps": min(tile.num_warps * rows // tile.rows, 32),  # a block has at most 32
        "num_stages": tile.num_stages,
    }


@triton.jit
def _narrow(x, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    """Round ``x`` to nearest even. The interpreter by itself would truncate float32 to bfloat16."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def fold(row_max, row_sum, total, next_max, next_sum, next_total):
    """Combine the states of two runs of keys: max and sum of a row's weights, and sum of the weighted values.

    It uses ``fma`` explicitly. So both kernels that fold round alike, whatever the compiler would contract.
    """
    new_max = tl.maximum(row_max, next_max)
    finite = tl.where(new_max == float("-inf"), 0.0, new_max)  # no key yet: exp(-inf), not exp(nan)
    keep, add = tl.exp(row_max - finite), tl.exp(next_max - finite)
    row_sum = tl.fma(row_sum, keep, next_sum * add)
    total = tl.fma(total, tl.broadcast_to(keep[:, None], total.shape), next_total * add[:, None])
    return new_max, row_sum, total


@triton.jit
def _attend_split(
    q, key, value, key_stride, value_stride, page_row, first_token, begin, end, first, limit, softmax_scale,
    HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, WINDOWED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Return the state of a tile's rows after keys ``begin`` to ``end``. Row ``i`` sees the keys below ``limit[i]``.

    If ``WINDOWED``, it sees only those from ``first[i]`` on. Blocks begin where they would without a window.
    """
    dims = tl.arange(0, BLOCK_D)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    skipped, lowest = 0, begin
    if WINDOWED:
        lowest = tl.maximum(begin, tl.min(tl.where(limit > begin, first, end)))
        skipped = (lowest - begin) // BLOCK_N * BLOCK_N
    for start in range(begin, end - skipped, BLOCK_N):
        index = start + skipped + tl.arange(0, BLOCK_N)
        inside = index < end
        if WINDOWED:
            inside &= index >= lowest
        if PAGE_SIZE:
            page = tl.load(page_row + index // PAGE_SIZE, mask=inside, other=0)
            token = page.to(tl.int64) * PAGE_SIZE + index % PAGE_SIZE
        else:
            token = first_token + index
        # Keys that no row may see are not read: their slots may hold NaN, and 0 * NaN is NaN.
        readable = inside[:, None] & (dims < HEAD_DIM)[None, :]
        keys = tl.load(key + token[:, None] * key_stride + dims[None, :], mask=readable, other=0.0)
        scores = dot(q, tl.trans(keys)) * softmax_scale
        visible = inside[None, :] & (index[None, :] < limit[:, None])
        if WINDOWED:
            visible &= index[None, :] >= first[:, None]
        scores = tl.where(visible, scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        finite = tl.where(new_max == float("-inf"), 0.0, new_max)
        weights = tl.exp(scores - finite[:, None])
        keep = tl.exp(row_max - finite)
        values = tl.load(value + token[:, None] * value_stride + dims[None, :], mask=readable, other=0.0)
        # Weights are rounded to the values' dtype for the tensor cores, as in PyTorch's own kernels. Their sum is not
        # rounded. Each weight is off by half an eps, so ``out`` is off by less than half an eps of the largest value.
        rounded = _narrow(weights, value.dtype.element_ty, INTERPRETED)
        row_sum = tl.fma(row_sum, keep, tl.sum(weights, 1))
        total = total * keep[:, None] + dot(rounded, values)
        row_max = new_max
    return row_max, row_sum, total


@triton.jit
def store_result(
    row_max, row_sum, total, out, lse, row, mask, HEAD_DIM, BLOCK_D: tl.constexpr, INTERPRETED: tl.constexpr
):
    dims = tl.arange(0, BLOCK_D)
    seen = row_sum != 0  # NaN too
    total = tl.where(seen[:, None], total / tl.where(seen, row_sum, 1.0)[:, None], 0.0)
    total = _narrow(total, out.dtype.element_ty, INTERPRETED)
    tl.store(out + row[:, None] * HEAD_DIM + dims[None, :], total, mask=mask[:, None] & (dims < HEAD_DIM)[None, :])
    tl.store(lse + row, tl.where(seen, row_max + tl.log(tl.where(seen, row_sum, 1.0)), float("-inf")), mask=mask)


@triton.jit
def run_tile(
    query, key, value, out, lse, max_states, sum_states, total_states,
    query_stride, query_head_stride, key_stride, key_head_stride, value_stride, value_head_stride,
    page_row, first_token, token, valid, first, limit, split_keys, num_states, num_rows, softmax_scale,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, WALK: tl.constexpr, WINDOWED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Attend with the ``valid`` rows of a tile to this program's split, or, with ``WALK``, to all splits in turn.

    If ``WINDOWED``, the first split is that of the first key that a row sees. No row sees more than ``num_states``
    splits, which follow each other, so that split ``i`` has the state ``i % num_states``.
    """
    kv_head = tl.program_id(1).to(tl.int64)
    dims = tl.arange(0, BLOCK_D)
    head = kv_head * HEADS + tl.arange(0, BLOCK_M) % HEADS
    token = token.to(tl.int64)
    row = token * (HEADS * tl.num_programs(1)) + head  # row of out and lse, which are contiguous
    key += kv_head * key_head_stride
    value += kv_head * value_head_stride
    stop = tl.max(limit)
    begin, skipped = 0 if WALK else tl.program_id(2) * split_keys, 0
    if WINDOWED:
        skipped = tl.minimum(tl.min(first), stop) // split_keys * split_keys
        if not WALK:
            begin += skipped
    if WALK or begin < stop:
        q = tl.load(
            query + (token * query_stride + head * query_head_stride)[:, None] + dims[None, :],
            mask=valid[:, None] & (dims < HEAD_DIM)[None, :],
            other=0.0,
        )
        if WALK:
            row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
            row_sum = tl.zeros([BLOCK_M], tl.float32)
            total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
            for walked in range(0, stop - skipped, split_keys):
                split = walked + skipped
                next_max, next_sum, next_total = _attend_split(
                    q, key, value, key_stride, value_stride, page_row, first_token,
                    split, tl.minimum(split + split_keys, stop), first, limit, softmax_scale,
                    HEAD_DIM, PAGE_SIZE, WINDOWED, BLOCK_M, BLOCK_N, BLOCK_D, INTERPRETED,
                )  # fmt: skip
                row_max, row_sum, total = fold(row_max, row_sum, total, next_max, next_sum, next_total)
            store_result(row_max, row_sum, total, out, lse, row, valid, HEAD_DIM, BLOCK_D, INTERPRETED)
        else:
            row_max, row_sum, total = _attend_split(
                q, key, value, key_stride, value_stride, page_row, first_token,
                begin, tl.minimum(begin + split_keys, stop), first, limit, softmax_scale,
                HEAD_DIM, PAGE_SIZE, WINDOWED, BLOCK_M, BLOCK_N, BLOCK_D, INTERPRETED,
            )  # fmt: skip
            state = tl.program_id(2).to(tl.int64) * num_rows + row
            if WINDOWED:
                state = (begin // split_keys % num_states).to(tl.int64) * num_rows + row
                valid &= (first < begin + split_keys) & (limit > begin)
            tl.store(max_states + state, row_max, mask=valid)
            tl.store(sum_states + state, row_sum, mask=valid)
            target = total_states + state[:, None] * HEAD_DIM + dims[None, :]
            tl.store(target, total, mask=valid[:, None] & (dims < HEAD_DIM)[None, :])
