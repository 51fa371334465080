"""The product of two tiles, also in Triton's interpreter."""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b, sum=None):
    """Return a @ b in float32, plus ``sum`` if it is given. ``b`` has the dtype of ``a``, or it is int8.

    The interpreter by itself would multiply the bits of bfloat16.
    """
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    else:
        b = b.to(a.dtype)
    return tl.dot(a, b, sum, input_precision="ieee")
