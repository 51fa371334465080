"""few_row_linear for a GPU: int8 is widened in registers, so that a step reads one byte of a weight and not two.

A program multiplies all rows with a few rows of the weight, which it reads once. There are as many programs as keep
enough reads in flight. Each sum has a fixed order. The tiles are reasoned and not measured.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from llava_cot_kernels.triton.dot import dot

MAX_ROWS = 64  # of a program


@triton.jit
def _few_row_linear_kernel(
    x, weight, scale, bias, out, M, N, K, x_stride, weight_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    num_row_tiles = tl.cdiv(M, ROWS)  # those that read the same rows of the weight run side by side
    row = tl.program_id(0) % num_row_tiles * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) // num_row_tiles * COLUMNS + tl.arange(0, COLUMNS)
    k = tl.arange(0, DEPTH)
    is_row, is_column = row < M, column < N
    x_at = x + row[:, None].to(tl.int64) * x_stride + k[None, :]
    w_at = weight + column[None, :].to(tl.int64) * weight_stride + k[:, None]
    product = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, K, DEPTH):
        inside = k < K - start
        part = tl.load(x_at, mask=is_row[:, None] & inside[None, :], other=0.0)
        w = tl.load(w_at, mask=is_column[None, :] & inside[:, None], other=0)
        product = dot(part, w, product)
        x_at += DEPTH
        w_at += DEPTH
    if scale is not None:
        product *= tl.load(scale + column, mask=is_column, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        product += tl.load(bias + column, mask=is_column, other=0.0).to(tl.float32)[None, :]
    at = out + row[:, None].to(tl.int64) * N + column[None, :]
    tl.store(at, product.to(out.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])


def tile(num_rows: int, num_outputs: int, dtype: torch.dtype) -> dict[str, int]:
    """Choose narrow tiles for small weights, so that many programs share them, and deep ones for few rows."""
    rows = 16 if num_rows <= 16 else 32 if num_rows <= 32 else MAX_ROWS
    columns = 16 if num_outputs <= 2048 else 32
    if dtype == torch.float32:  # no tensor cores: a thread holds what it multiplies
        depth, num_warps = 32, 4
    else:
        depth, num_warps = 256 if rows == 16 else 128, columns // 8
    return {"ROWS": rows, "COLUMNS": columns, "DEPTH": depth, "num_warps": num_warps, "num_stages": 4}


@torch.library.custom_op("llava_cot_kernels_triton::few_row_linear", mutates_args=("out",))
def few_row_linear(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, out: Tensor) -> None:
    (M, K), N = x.shape, weight.shape[0]
    if 0 in (M, N):
        return
    chosen = tile(M, N, x.dtype)
    grid = (triton.cdiv(N, chosen["COLUMNS"]) * triton.cdiv(M, chosen["ROWS"]),)
    with torch.cuda.device_of(x):
        _few_row_linear_kernel[grid](
            x, weight, scale, bias, out, M, N, K, x.stride(0), weight.stride(0), **chosen
        )  # fmt: skip


@few_row_linear.register_fake
def _(*_) -> None:
    return None
