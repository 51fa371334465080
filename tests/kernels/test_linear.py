"""few_row_linear against float64, over odd shapes, dtypes and instruction sets."""

import pytest
import torch
from helpers.linear import assert_close, random_case
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_cot_kernels import _C, few_row_linear
from llava_cot_kernels.backend import OPS
from llava_cot_kernels.checks import FLOATS

ISAS = _C.available_isas()
KINDS = [*FLOATS, torch.int8]
# Rows, outputs and inputs: nothing, one, primes, whole vectors and chunks, and x in L1 or beyond it.
SHAPES = [
    (0, 5, 7),
    (1, 1, 1),
    (3, 0, 4),
    (2, 3, 0),
    (1, 67, 33),
    (4, 130, 640),
    (5, 64, 31),
    (16, 65, 97),
    (23, 7, 3001),
]


@pytest.fixture(params=ISAS, autouse=True)
def isa(request, isa_of_run):
    _C.set_isa(request.param)
    yield
    _C.set_isa(isa_of_run)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_products_are_those_of_float64(shape, kind, with_bias):
    for dtype in FLOATS if kind == torch.int8 else [kind]:
        x, weight, scale, bias = random_case(*shape, kind, dtype)
        if not with_bias:
            bias = None
        out = torch.full((shape[0], shape[1]), torch.nan, dtype=dtype)
        OPS["native"].few_row_linear(x, weight, scale, bias, out)
        assert_close(out, x, weight, scale, bias)
        assert torch.equal(out, few_row_linear(x, weight, scale, bias))
        assert_close(few_row_linear(x, weight, scale, bias, backend="reference"), x, weight, scale, bias)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 20), outputs=st.integers(1, 150), inputs=st.integers(1, 900), kind=st.sampled_from(KINDS),
    seed=st.integers(0, 2**31),
)  # fmt: skip
def test_a_row_has_the_same_bits_in_every_batch(rows, outputs, inputs, kind, seed):
    x, weight, scale, bias = random_case(rows, outputs, inputs, kind, seed=seed)
    together = few_row_linear(x, weight, scale, bias)
    assert_close(together, x, weight, scale, bias)
    row = seed % rows
    assert torch.equal(few_row_linear(x[row : row + 1], weight, scale, bias)[0], together[row])
    first = seed % outputs
    part = few_row_linear(x, weight[first:], None if scale is None else scale[first:], bias[first:])
    assert torch.equal(part, together[:, first:])


def test_threads_change_no_bit():
    x, weight, _, bias = random_case(6, 3000, 640, torch.float32)
    before = torch.get_num_threads()
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(few_row_linear(x, weight, None, bias))
    torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("kind", FLOATS)
def test_what_is_not_finite_stays_in_its_outputs(kind):
    """Also where it is in the rest of a row, behind the last whole vector."""
    x, weight, _, _ = random_case(3, 5, 37, kind)
    weight[2, 36], weight[4, 3] = torch.inf, torch.nan
    x[1, 36] = 0.0
    out = few_row_linear(x, weight)
    assert out[:, 4].isnan().all() and out[1, 2].isnan() and out[0, 2].isinf() and out[2, 2].isinf()
    assert out[:, [0, 1, 3]].isfinite().all()


def test_bad_arguments():
    x, weight, scale, bias = random_case(2, 3, 4, torch.int8)
    with pytest.raises(ValueError, match="scale must be a tensor if weight is int8, and None otherwise, got None"):
        few_row_linear(x, weight)
    with pytest.raises(ValueError, match="scale must be a tensor if weight is int8, and None otherwise, got a tensor"):
        few_row_linear(x, weight.float(), scale)
    with pytest.raises(ValueError, match="weight must have K=4 in dimension 1, got 3"):
        few_row_linear(x, weight[:, :3], scale)
    with pytest.raises(TypeError, match="weight must be float32 or int8, got bfloat16"):
        few_row_linear(x, weight.bfloat16())
    with pytest.raises(TypeError, match="bias must be float32, got bfloat16"):
        few_row_linear(x, weight, scale, bias.bfloat16())
    with pytest.raises(ValueError, match="x must not require grad"):
        few_row_linear(x.clone().requires_grad_(), weight, scale)
    with pytest.raises(ValueError, match="backend of few_row_linear on cpu must be one of"):
        few_row_linear(x, weight, scale, backend="cublas")
