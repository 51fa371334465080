"""few_row_linear of Triton against float64: every tile, odd shapes, and its place in a compiled graph."""

import pytest
import torch
from helpers.linear import assert_close, random_case

from llava_cot_kernels import few_row_linear
from llava_cot_kernels.backend import OPS, available
from llava_cot_kernels.checks import FLOATS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytest.importorskip("llava_cot_kernels.triton.linear")
# Rows, outputs and inputs: nothing, one, primes, a tile and one more, both widths of a tile, all numbers of rows.
SHAPES = [(0, 5, 7), (1, 1, 1), (3, 0, 4), (2, 3, 0), (1, 67, 257), (16, 33, 256), (17, 40, 129), (33, 21, 64)]
SHAPES += [(2, 2050, 40), (65, 16, 31)]


def on_device(case):
    return [None if tensor is None else tensor.to(DEVICE) for tensor in case]


def test_triton_is_a_back_end_of_this_run():
    assert "triton" in available("few_row_linear", DEVICE)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_int8_is_that_of_float64(shape, dtype):
    x, weight, scale, bias = on_device(random_case(*shape, torch.int8, dtype))
    for given in (bias, None):
        out = torch.full((shape[0], shape[1]), torch.nan, dtype=dtype, device=DEVICE)
        OPS["triton"].few_row_linear(x, weight, scale, given, out)
        assert_close(out, x, weight, scale, given)
        assert torch.equal(out, few_row_linear(x, weight, scale, given, backend="triton"))


@pytest.mark.parametrize("dtype", FLOATS)
def test_other_weights_too(dtype):
    x, weight, _, bias = on_device(random_case(5, 35, 70, dtype))
    assert_close(few_row_linear(x, weight, None, bias, backend="triton"), x, weight, None, bias)


def test_rows_may_be_far_apart():
    """Further than 32 bits count; the memory between them is never touched."""
    stride = 1 << 26
    x = torch.empty(39 * stride + 8, dtype=torch.float16, device=DEVICE).as_strided((40, 8), (stride, 1)).fill_(1)
    weight = torch.ones(3, 8, dtype=torch.int8, device=DEVICE)
    assert (few_row_linear(x, weight, torch.ones(3, device=DEVICE), backend="triton") == 8).all()


def test_a_row_does_not_depend_on_the_others():
    x, weight, scale, bias = on_device(random_case(9, 50, 300, torch.int8, torch.bfloat16))
    together = few_row_linear(x, weight, scale, bias, backend="triton")
    x[1:] = torch.nan
    again = few_row_linear(x, weight, scale, bias, backend="triton")
    assert torch.equal(again[0], together[0]) and again[1:].isnan().all()


def test_it_has_no_gradient():
    x, weight, scale, _ = on_device(random_case(2, 3, 4, torch.int8))
    with pytest.raises(ValueError, match="x must not require grad, since triton few_row_linear has no backward"):
        few_row_linear(x.clone().requires_grad_(), weight, scale, backend="triton")
