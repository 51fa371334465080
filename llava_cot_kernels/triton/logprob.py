"""linear_logprobs and its backward for a GPU: [T, V] is never materialised, and every sum has a fixed order.

Forward: a program multiplies a tile of rows with a span of the vocabulary, tile by tile. It keeps a running (max, sum,
weighted sum) per row, and a second kernel merges the spans. Up to 64 rows are one row tile, so the head is read once.

Backward: for each chunk of the vocabulary, the gradient of the logits is written in the dtype of the inputs to a buffer
that is small enough for L2. It is then multiplied with the hidden states and with the weight. A chunk keeps every row,
so its part of grad_weight is final at once. Liger's form, chunks of few rows and all tokens, was measured up to twice
as slow as plain PyTorch.

No product is cuBLAS's. Only the device knows the number of kept rows, and a host that read it would wait. Own products
also make sure that no global flag turns float32 into tf32.

Memory beyond the results: the forward takes 12 bytes a row and span, so 1.5 KiB a row (at most 48 KiB for few rows).
The backward takes 16 MiB for the gradient of logits (2048 tokens' from 4096 16-bit rows up) and 8 MiB for float32 sums
(or one [T, H], if that is larger). The entropy is always computed: it adds two operations to the 2 H of a logit.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from llava_cot_kernels.reference.logprob import IGNORE_INDEX
from llava_cot_kernels.triton.dot import dot

IGNORED = tl.constexpr(IGNORE_INDEX)
INF = tl.constexpr(float("inf"))
GROUP = tl.constexpr(16)  # row tiles that go through the columns together

DLOGITS_BYTES = 16 << 20  # the gradient of a chunk: a third of the L2 of an H200
MIN_CHUNK = 2048  # tokens, for any number of rows: each chunk reads and writes the sums for grad_hidden once
PARTS_BYTES = 8 << 20  # the limit of partial sums, into which a chunk is split if too few rows would not fill the GPU
PROGRAMS = 256  # this many fill the GPU


@dataclass(frozen=True)
class Tile:
    """The shape of a program's work: ``rows x columns`` in steps of ``depth``."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int
    max_spans: int = 4096  # spans of the vocabulary that ``_merge_kernel`` reads for one row

    def constants(self) -> dict[str, int]:
        shape = {"ROWS": self.rows, "COLUMNS": self.columns, "DEPTH": self.depth}
        return shape | {"num_warps": self.num_warps, "num_stages": self.num_stages}


def logits_tile(num_rows: int, dtype: torch.dtype) -> Tile:
    """Choose small tiles for few rows, so that many reads of the weight are in flight, and large ones otherwise."""
    if dtype == torch.float32:  # tensor cores would round to tf32
        return Tile(16, 64, 64, 4, 3) if num_rows <= 16 else Tile(64, 128, 32, 8, 3, max_spans=128)
    if num_rows <= 64:
        return Tile(16, 64, 128, 4, 5) if num_rows <= 16 else Tile(64, 128, 64, 4, 4)
    return Tile(128, 256, 64, 8, 3, max_spans=128)


def grad_weight_tile(num_rows: int, dtype: torch.dtype) -> Tile:
    if dtype == torch.float32:
        return Tile(64, 128, 32, 8, 3)
    return Tile(128, 256, 32 if num_rows <= 32 else 64, 8, 5)


def grad_hidden_tile(num_rows: int, dtype: torch.dtype) -> Tile:
    if dtype == torch.float32:
        return Tile(16 if num_rows <= 16 else 64, 128, 32, 8, 3)
    return Tile(16 if num_rows <= 16 else 64 if num_rows <= 64 else 128, 128, 64, 8, 4)


# ---- what the kernels share ----


@triton.jit
def _bounded(d):
    """Bound ``d`` as a factor of exp(d). Where exp(d) is 0, 0 * -88 is 0 and 0 * -inf would be NaN. A NaN stays."""
    return tl.where(d < -88.0, -88.0, d)


@triton.jit
def _tile_of_program(num_row_tiles, num_column_tiles):
    """Order programs so that neighbours share a column tile in L2, and their GROUP row tiles stay there too."""
    program = tl.program_id(0)
    first = program // (GROUP * num_column_tiles) * GROUP
    height = tl.minimum(num_row_tiles - first, GROUP)
    place = program % (GROUP * num_column_tiles)
    return first + place % height, place // height


@triton.jit
def _logits(
    hidden, weight, row, token, H, hidden_stride, weight_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Return hidden[row] @ weight[token].T, before the temperature."""
    h = tl.arange(0, DEPTH)
    x_at = hidden + row[:, None] * hidden_stride + h[None, :]
    w_at = weight + token[None, :] * weight_stride + h[:, None]
    logits = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, H, DEPTH):
        inside = h < H - start
        x = tl.load(x_at, mask=inside[None, :], other=0.0)
        w = tl.load(w_at, mask=inside[:, None], other=0.0)
        logits = dot(x, w, logits)
        x_at += DEPTH
        w_at += DEPTH
    return logits


@triton.jit
def _list_kept_rows_kernel(targets, rows, num_kept, T, BLOCK: tl.constexpr):
    """Write the rows whose target is a token to rows[:num_kept], in order. A single program runs, so nothing races."""
    count = tl.full((), 0, tl.int32)
    for start in range(0, T, BLOCK):
        row = start + tl.arange(0, BLOCK)
        kept = (tl.load(targets + row, mask=row < T, other=IGNORED) != IGNORED).to(tl.int32)
        place = count + tl.cumsum(kept, 0) - 1
        tl.store(rows + place, row.to(tl.int64), mask=kept != 0)
        count += tl.sum(kept, 0)
    tl.store(num_kept, count)


def _list_kept_rows(targets: Tensor) -> tuple[Tensor, Tensor]:
    rows, num_kept = torch.empty_like(targets), targets.new_empty(1, dtype=torch.int32)
    _list_kept_rows_kernel[(1,)](targets, rows, num_kept, len(targets), BLOCK=1024)
    return rows, num_kept


# ---- forward ----


@triton.jit(do_not_specialize=["T", "V", "num_spans", "tiles_per_span"])
def _spans_kernel(
    hidden, weight, targets, rows, num_kept, target_logits, largests, totals, weighteds,
    scale, T, V, H, hidden_stride, weight_stride, num_spans, tiles_per_span,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Reduce the logits x of kept rows over a span of tokens.

    The results per row are the largest and, with d = scale * (x - largest), the sums of exp(d) and of exp(d) * d. A NaN
    makes the sums NaN. If all logits are -inf the sums are 0.
    """
    row_tile, span = _tile_of_program(tl.cdiv(T, ROWS), num_spans)
    count = tl.load(num_kept)
    if row_tile * ROWS >= count:
        return
    k = row_tile * ROWS + tl.arange(0, ROWS)
    kept = k < count
    row = tl.load(rows + k, mask=kept, other=0)  # spare rows of the last tile compute row 0 and are not stored
    target = tl.load(targets + row).to(tl.int32)
    largest = tl.full((ROWS,), -INF, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    weighted = tl.zeros((ROWS,), tl.float32)
    first_tile = span * tiles_per_span
    for tile in range(first_tile, tl.minimum(first_tile + tiles_per_span, tl.cdiv(V, COLUMNS))):
        token = tile * COLUMNS + tl.arange(0, COLUMNS)
        read = tl.minimum(token, V - 1).to(tl.int64)
        x = _logits(hidden, weight, row, read, H, hidden_stride, weight_stride, ROWS, COLUMNS, DEPTH)
        x = tl.where((token < V)[None, :], x, -INF)
        target_logit = tl.sum(tl.where(token[None, :] == target[:, None], x, 0.0), 1)
        here = (target >= tile * COLUMNS) & (target < (tile + 1) * COLUMNS)
        tl.store(target_logits + row, target_logit, mask=kept & here)
        before = largest
        largest = tl.maximum(before, tl.max(x, 1))
        shift = tl.where(largest == -INF, 0.0, largest)
        d = scale * (x - shift[:, None])
        e = tl.exp(d)
        d_before = scale * (before - shift)
        decay = tl.exp(d_before)
        weighted = decay * (weighted + _bounded(d_before) * total) + tl.sum(e * _bounded(d), 1)
        total = decay * total + tl.sum(e, 1)
    at = row * num_spans + span
    tl.store(largests + at, largest, mask=kept)
    tl.store(totals + at, total, mask=kept)
    tl.store(weighteds + at, weighted, mask=kept)


@triton.jit(do_not_specialize=["V"])
def _merge_kernel(
    largests, totals, weighteds, target_logits, targets, logprobs, lse, entropy, scale, V, num_spans,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Merge the spans of one row, as a tree. A target out of range gives NaN, since a device cannot raise."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    if target == IGNORED:
        tl.store(logprobs + row, 0.0)
        tl.store(lse + row, 0.0)
        tl.store(entropy + row, 0.0)
        return
    span = tl.arange(0, BLOCK)
    inside = span < num_spans
    at = row * num_spans + span
    largest = tl.load(largests + at, mask=inside, other=-INF)
    total = tl.load(totals + at, mask=inside, other=0.0)
    weighted = tl.load(weighteds + at, mask=inside, other=0.0)
    peak = tl.max(largest, 0)
    d = scale * (largest - tl.where(peak == -INF, 0.0, peak))
    decay = tl.exp(d)
    weighted = tl.sum(decay * (weighted + _bounded(d) * total), 0)
    total = tl.sum(decay * total, 0)
    log_total = tl.log(total)
    is_token = (target >= 0) & (target < V)
    target_logit = tl.load(target_logits + row, mask=is_token, other=float("nan"))
    tl.store(logprobs + row, scale * (target_logit - peak) - log_total)
    tl.store(lse + row, tl.where(is_token, scale * peak + log_total, float("nan")))
    tl.store(entropy + row, tl.where(is_token, log_total - weighted / total, float("nan")))


@torch.library.custom_op("llava_cot_kernels_triton::linear_logprobs", mutates_args=("logprobs", "lse", "entropy"))
def linear_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float,
    logprobs: Tensor, lse: Tensor, entropy: Tensor,
) -> None:  # fmt: skip
    (T, H), V = hidden.shape, weight.shape[0]
    if T == 0:
        return
    tile = logits_tile(T, hidden.dtype)
    num_tiles = triton.cdiv(V, tile.columns)
    tiles_per_span = max(1, triton.cdiv(num_tiles, tile.max_spans))
    num_spans = max(1, triton.cdiv(num_tiles, tiles_per_span))
    spans = torch.empty(3, T, num_spans, dtype=torch.float32, device=hidden.device).unbind()
    target_logits = torch.empty_like(logprobs)
    with torch.cuda.device_of(hidden):
        rows, num_kept = _list_kept_rows(targets)
        _spans_kernel[(triton.cdiv(T, tile.rows) * num_spans,)](
            hidden, weight, targets, rows, num_kept, target_logits, *spans,
            1 / temperature, T, V, H, hidden.stride(0), weight.stride(0), num_spans, tiles_per_span,
            **tile.constants(),
        )  # fmt: skip
        _merge_kernel[(T,)](
            *spans, target_logits, targets, logprobs, lse, entropy, 1 / temperature, V, num_spans,
            BLOCK=triton.next_power_of_2(num_spans),
        )  # fmt: skip


# ---- backward ----


@triton.jit(do_not_specialize=["T", "V", "first_token"])
def _dlogits_kernel(
    grad_logprobs, grad_entropy, hidden, weight, targets, lse, entropy, rows, num_kept, dlogits,
    scale, T, V, H, hidden_stride, weight_stride, dlogits_stride, first_token, num_tokens,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of a chunk's logits for the kept rows.

    With z = scale * x, d logprob / dz = onehot - p and d entropy / dz = -p (log p + entropy).
    """
    row_tile, token_tile = _tile_of_program(tl.cdiv(T, ROWS), tl.cdiv(num_tokens, COLUMNS))
    count = tl.load(num_kept)
    if row_tile * ROWS >= count:
        return
    k = row_tile * ROWS + tl.arange(0, ROWS)
    kept = k < count
    row = tl.load(rows + k, mask=kept, other=0)
    column = token_tile * COLUMNS + tl.arange(0, COLUMNS)
    token = first_token + column
    read = tl.minimum(token, V - 1).to(tl.int64)
    x = _logits(hidden, weight, row, read, H, hidden_stride, weight_stride, ROWS, COLUMNS, DEPTH)
    on_target = scale * tl.load(grad_logprobs + row)
    by_logp = -scale * tl.load(grad_entropy + row)
    constant = by_logp * tl.load(entropy + row) - on_target
    logp = scale * x - tl.load(lse + row)[:, None]
    grad = tl.exp(logp) * (constant[:, None] + by_logp[:, None] * _bounded(logp))
    is_target = token[None, :] == tl.load(targets + row).to(tl.int32)[:, None]
    grad = tl.where(is_target, grad + on_target[:, None], grad)
    at = dlogits + k.to(tl.int64)[:, None] * dlogits_stride + column[None, :]
    tl.store(at, grad.to(dlogits.dtype.element_ty), mask=kept[:, None] & (column < num_tokens)[None, :])


@triton.jit(do_not_specialize=["first_token", "num_tokens"])
def _grad_weight_kernel(
    dlogits, hidden, rows, num_kept, grad_weight, H, hidden_stride, dlogits_stride, first_token, num_tokens,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Compute grad_weight[chunk] = dlogits.T @ hidden[kept]."""
    token_tile, h_tile = _tile_of_program(tl.cdiv(num_tokens, ROWS), tl.cdiv(H, COLUMNS))
    count = tl.load(num_kept)
    column = token_tile * ROWS + tl.arange(0, ROWS)
    h = h_tile * COLUMNS + tl.arange(0, COLUMNS)
    sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, count, DEPTH):
        k = start + tl.arange(0, DEPTH)
        kept = k < count
        row = tl.load(rows + k, mask=kept, other=0)
        d_at = dlogits + k.to(tl.int64)[None, :] * dlogits_stride + column[:, None]
        d = tl.load(d_at, mask=kept[None, :] & (column < dlogits_stride)[:, None], other=0.0)
        x_at = hidden + row[:, None] * hidden_stride + h[None, :]
        x = tl.load(x_at, mask=kept[:, None] & (h < H)[None, :], other=0.0)
        sum = dot(d, x, sum)
    at = grad_weight + (first_token + column).to(tl.int64)[:, None] * H + h[None, :]
    tl.store(at, sum.to(grad_weight.dtype.element_ty), mask=(column < num_tokens)[:, None] & (h < H)[None, :])


@triton.jit(do_not_specialize=["T", "first_token", "num_tokens"])
def _add_grad_hidden_kernel(
    dlogits, weight, rows, num_kept, parts, T, H, weight_stride, dlogits_stride, first_token, num_tokens,
    tokens_per_part, IS_FIRST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Add dlogits @ weight[chunk] to parts[part, kept], over this part of the chunk's tokens."""
    row_tile, h_tile = _tile_of_program(tl.cdiv(T, ROWS), tl.cdiv(H, COLUMNS))
    part = tl.program_id(1)
    count = tl.load(num_kept)
    if row_tile * ROWS >= count:
        return
    k = row_tile * ROWS + tl.arange(0, ROWS)
    kept = k < count
    h = h_tile * COLUMNS + tl.arange(0, COLUMNS)
    sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    end = tl.minimum((part + 1) * tokens_per_part, num_tokens)
    for start in range(part * tokens_per_part, end, DEPTH):
        column = start + tl.arange(0, DEPTH)
        d_at = dlogits + k.to(tl.int64)[:, None] * dlogits_stride + column[None, :]
        d = tl.load(d_at, mask=kept[:, None], other=0.0)
        w_at = weight + (first_token + column).to(tl.int64)[:, None] * weight_stride + h[None, :]
        w = tl.load(w_at, mask=(column < end)[:, None] & (h < H)[None, :], other=0.0)
        sum = dot(d, w, sum)
    row = tl.load(rows + k, mask=kept, other=0)
    at = parts + (part.to(tl.int64) * T + row)[:, None] * H + h[None, :]
    inside = kept[:, None] & (h < H)[None, :]
    if not IS_FIRST:
        sum += tl.load(at, mask=inside, other=0.0)
    tl.store(at, sum, mask=inside)


@triton.jit(do_not_specialize=["T", "num_parts"])
def _write_grad_hidden_kernel(parts, targets, grad_hidden, T, H, num_parts, BLOCK: tl.constexpr):
    """Set grad_hidden[row] to the sum of its parts, or to 0 for an ignored row."""
    row = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = h < H
    sum = tl.zeros((BLOCK,), tl.float32)
    if tl.load(targets + row) != IGNORED:
        for part in range(num_parts):
            sum += tl.load(parts + (row + part * T) * H + h, mask=inside, other=0.0)
    tl.store(grad_hidden + row * H + h, sum.to(grad_hidden.dtype.element_ty), mask=inside)


@torch.library.custom_op(
    "llava_cot_kernels_triton::linear_logprobs_backward", mutates_args=("grad_hidden", "grad_weight")
)
def linear_logprobs_backward(
    grad_logprobs: Tensor, grad_entropy: Tensor, hidden: Tensor, weight: Tensor, targets: Tensor, lse: Tensor,
    entropy: Tensor, temperature: float, grad_hidden: Tensor | None, grad_weight: Tensor | None,
) -> None:  # fmt: skip
    (T, H), V = hidden.shape, weight.shape[0]
    if 0 in (T, H, V):
        for grad in (grad_hidden, grad_weight):
            if grad is not None:
                grad.zero_()
        return
    chunk = min(V, max(MIN_CHUNK, DLOGITS_BYTES // (T * hidden.element_size())))
    # It is read in whole steps. Past the tokens of the last chunk it has zeros or old values; their weight is 0.
    dlogits = hidden.new_zeros(T, triton.cdiv(chunk, 64) * 64)
    strides = hidden.stride(0), weight.stride(0), dlogits.stride(0)
    tile = logits_tile(T, hidden.dtype)
    parts = _new_parts(hidden, chunk) if grad_hidden is not None else None
    with torch.cuda.device_of(hidden):
        rows, num_kept = _list_kept_rows(targets)
        for first in range(0, V, chunk):
            num_tokens = min(chunk, V - first)
            _dlogits_kernel[(triton.cdiv(T, tile.rows) * triton.cdiv(num_tokens, tile.columns),)](
                grad_logprobs, grad_entropy, hidden, weight, targets, lse, entropy, rows, num_kept, dlogits,
                1 / temperature, T, V, H, *strides, first, num_tokens, **tile.constants(),
            )  # fmt: skip
            if grad_weight is not None:
                _write_grad_weight(dlogits, hidden, rows, num_kept, grad_weight, num_tokens, first)
            if parts is not None:
                _add_grad_hidden(dlogits, weight, rows, num_kept, parts, num_tokens, first)
        if parts is not None:
            _write_grad_hidden_kernel[(T, triton.cdiv(H, 1024))](
                parts, targets, grad_hidden, T, H, len(parts), BLOCK=1024
            )


def _write_grad_weight(
    dlogits: Tensor, hidden: Tensor, rows: Tensor, num_kept: Tensor, grad_weight: Tensor, num_tokens: int, first: int
) -> None:
    T, H = hidden.shape
    tile = grad_weight_tile(T, hidden.dtype)
    _grad_weight_kernel[(triton.cdiv(num_tokens, tile.rows) * triton.cdiv(H, tile.columns),)](
        dlogits, hidden, rows, num_kept, grad_weight, H, hidden.stride(0), dlogits.stride(0), first, num_tokens,
        **tile.constants(),
    )  # fmt: skip


def _new_parts(hidden: Tensor, chunk: int) -> Tensor:
    """Allocate sums for grad_hidden, float32 [num_parts, T, H].

    There are as many parts as fill the GPU, fit in the budget and have work to do.
    """
    (T, H), tile = hidden.shape, grad_hidden_tile(len(hidden), hidden.dtype)
    num_tiles = triton.cdiv(T, tile.rows) * triton.cdiv(H, tile.columns)
    num_parts = min(PROGRAMS // num_tiles, PARTS_BYTES // (4 * T * H), chunk // (8 * tile.depth))
    return hidden.new_empty(max(1, num_parts), T, H, dtype=torch.float32)


def _add_grad_hidden(
    dlogits: Tensor, weight: Tensor, rows: Tensor, num_kept: Tensor, parts: Tensor, num_tokens: int, first: int
) -> None:
    num_parts, T, H = parts.shape
    tile = grad_hidden_tile(T, weight.dtype)
    tokens_per_part = triton.cdiv(triton.cdiv(num_tokens, num_parts), tile.depth) * tile.depth
    _add_grad_hidden_kernel[(triton.cdiv(T, tile.rows) * triton.cdiv(H, tile.columns), num_parts)](
        dlogits, weight, rows, num_kept, parts, T, H, weight.stride(0), dlogits.stride(0), first, num_tokens,
        tokens_per_part, IS_FIRST=first == 0, **tile.constants(),
    )  # fmt: skip


@linear_logprobs.register_fake
@linear_logprobs_backward.register_fake
def _(*_) -> None:
    return None
