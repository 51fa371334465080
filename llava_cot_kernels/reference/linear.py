"""Products of a few rows in plain PyTorch. The arguments are those of ``llava_cot_kernels.linear``."""

from torch import Tensor
from torch.nn.functional import linear


def few_row_linear(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    if scale is None:
        return linear(x, weight, bias)
    product = linear(x.float(), weight.float()) * scale.float()
    return (product if bias is None else product + bias.float()).to(x.dtype)
