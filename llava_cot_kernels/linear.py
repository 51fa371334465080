"""The product of a few rows with a large weight, as in a decode step, where reading the weight takes the time."""

import torch
from torch import Tensor

from llava_cot_kernels.backend import OPS, choose
from llava_cot_kernels.checks import FLOATS, USE_REFERENCE, Sizes, check_no_gradient
from llava_cot_kernels.reference import linear as reference

MOST_ROWS = {"cpu": 32, "cuda": 64}
"""For up to so many rows the kernel is faster than PyTorch. On CPUs that is measured, with AVX2 and with AVX-512. On a
GPU nothing is measured yet: there the kernel reads an int8 weight once for so many rows."""


def few_row_linear(
    x: Tensor, weight: Tensor, scale: Tensor | None = None, bias: Tensor | None = None, *, backend: str = "auto"
) -> Tensor:
    """Return ``x @ (scale[:, None] * weight).T + bias``, reading the weight once and in order.

    Sums are float32. The sum of an output runs over the columns in a fixed order. On a CPU it does not depend on the
    other rows: a row gives the same bits in every batch, and with any number of threads.

    Args:
        x: [M, K], float32, bfloat16 or float16. For more than ``MOST_ROWS`` of them PyTorch's product is faster.
        weight: [N, K], in the dtype of ``x``, or int8.
        scale: [N], float32, bfloat16 or float16, what a row of an int8 weight is multiplied with; else None.
        bias: [N], in the dtype of ``x``; None for none.
        backend: ``"auto"``, ``"native"``, ``"triton"`` or ``"reference"``. On a GPU ``"auto"`` is Triton for int8 and
            else the reference, which is cuBLAS.

    Returns:
        [M, N], in the dtype of ``x``.

    Raises:
        ValueError, TypeError: an argument has another shape, dtype or device than stated here, or needs a gradient,
            which only ``"reference"`` has.
    """
    sizes = Sizes()
    sizes.check("x", x, "M K", FLOATS)
    sizes.check("weight", weight, "N K", (x.dtype, torch.int8), x.device)
    if (scale is not None) != (weight.dtype == torch.int8):
        found = "None" if scale is None else "a tensor"
        raise ValueError(f"scale must be a tensor if weight is int8, and None otherwise, got {found}")
    if scale is not None:
        sizes.check("scale", scale, "N", FLOATS, x.device)
    if bias is not None:
        sizes.check("bias", bias, "N", x.dtype, x.device)
    chosen = choose("few_row_linear", x.device.type, backend)
    if backend == "auto" and chosen == "triton" and scale is None:
        chosen = "reference"
    if chosen == "reference":
        return reference.few_row_linear(x, weight, scale, bias)
    given = [("x", x), ("weight", weight), ("scale", scale), ("bias", bias)]
    check_no_gradient(f"{chosen} few_row_linear", [(n, t) for n, t in given if t is not None], USE_REFERENCE)
    x, weight = (matrix if matrix.stride(1) == 1 else matrix.contiguous() for matrix in (x, weight))
    scale, bias = (None if vector is None else vector.contiguous() for vector in (scale, bias))
    out = x.new_empty(sizes["M"], sizes["N"])
    OPS[chosen].few_row_linear(x, weight, scale, bias, out)
    return out


@torch.library.register_fake("llava_cot_kernels::few_row_linear")
def _(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, out: Tensor) -> None:
    return None
