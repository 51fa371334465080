"""Random cases of few_row_linear, and how close to float64 its products must be."""

import torch


def random_case(rows, outputs, inputs, kind, dtype=None, seed=0):
    """x, weight, scale and bias; x and the weight are parts of larger tensors."""
    g = torch.Generator().manual_seed(seed)
    dtype = dtype or (torch.float32 if kind == torch.int8 else kind)
    x = torch.randn(rows, inputs + 3, generator=g).to(dtype)[:, 2 : 2 + inputs]
    if kind == torch.int8:
        weight = torch.randint(-128, 128, (outputs, inputs + 5), generator=g, dtype=torch.int8)[:, 1 : 1 + inputs]
        scale = torch.rand(outputs, generator=g) / 64
    else:
        weight, scale = torch.randn(outputs, inputs + 5, generator=g).to(dtype)[:, 1 : 1 + inputs], None
    return x, weight, scale, torch.randn(outputs, generator=g).to(dtype)


def exact(x, weight, scale, bias):
    """The product in float64, and the sum of the sizes of what is added up."""
    x, weight = x.double(), weight.double()
    scale = 1.0 if scale is None else scale.double()
    bias = torch.zeros(len(weight)) if bias is None else bias
    return x @ weight.T * scale + bias.double(), x.abs() @ weight.abs().T * scale + bias.double().abs()


def assert_close(out, x, weight, scale, bias):
    expected, size = exact(x, weight, scale, bias)
    # A sum of K products in 16 lanes has at most K / 16 + 5 roundings on its way, and the result one more.
    roundings = (x.shape[1] / 16 + 8) * torch.finfo(torch.float32).eps
    tolerance = size * roundings + expected.abs() * torch.finfo(out.dtype).eps
    error = (out.double() - expected).abs()
    assert (error <= tolerance).all(), f"{(error - tolerance).max():.3g} over the tolerance"
