"""Fewer, larger matrix products: linear layers that read the same input compute one product from one buffer of weights.

There is no second copy of a weight. The parameters of the caller's model move into the buffer, one behind the other,
and stay what they are in every other way: the same objects, with the same values.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TypeGuard

import torch
from torch import nn
from transformers import PreTrainedModel

from llava_cot.engine.alias import alias
from llava_cot.engine.follow import place
from llava_cot.families import family_of

# Where launches cost much. On a CPU they cost little, and in float32 a product that is twice as wide takes up to 15 %
# longer than two.
DEVICES = {"cuda"}
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
ALIGNMENT = 64  # bytes, as torch allocates on a CPU: how a product rounds may depend on where the weight begins


class Product:
    """The product of one input with a buffer of weights. Who asks first computes it, and the others take their part.

    Between two passes it holds no tensors but the weights.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, sizes: list[int]) -> None:
        self.weight, self.bias, self.sizes = weight, bias, sizes
        self.input: torch.Tensor | None = None
        self.parts: dict[int, torch.Tensor] = {}  # that nobody has taken yet, by the index of a linear layer

    def part(self, index: int, x: torch.Tensor) -> torch.Tensor:
        if x is not self.input or index not in self.parts:
            whole = nn.functional.linear(x, self.weight, self.bias)
            self.input, self.parts = x, dict(enumerate(whole.split(self.sizes, dim=-1)))
        part = self.parts.pop(index)
        if not self.parts:
            self.input = None
        return part


class Part(nn.Linear):
    """A linear layer whose output is a part of a product."""

    product: Product
    index: int

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.product.part(self.index, x)


def gather_weights(model: PreTrainedModel) -> None:
    """Let the weights of ``model`` that are multiplied with the same input lie in one buffer, if it is on a GPU.

    A weight may not move if anything else would notice: if it is tied, or part of a larger storage, or in shared
    memory, or if another tensor reads the same memory, such as one of a ``state_dict`` that somebody keeps. No more
    than one buffer is there twice at any time.
    """
    if model.device.type not in DEVICES:
        return
    modules = [module for _, module in model.named_modules(remove_duplicate=False)]
    uses = Counter(id(each) for module in modules for each in module._parameters.values())
    for layer in _layers(model):
        columns = [column for group in layer for column in _columns(group) if _buffer(column) is None]
        moving = [column for column in columns if all(uses[id(each)] == 1 and _may_move(each) for each in column)]
        for column in moving:
            _gather(column)
        if moving and model.device.type == "cuda":
            torch.cuda.empty_cache()  # the engine takes its pages from what is free on the device


def fuse_products(model: PreTrainedModel) -> None:
    """Compute one product where weights lie in one buffer; ``model`` is the engine's own copy."""
    for layer in _layers(model):
        for group in layer:
            buffers = [_buffer(parameters) for parameters in _columns(group)]
            if all(buffer is not None for buffer in buffers):
                weight, bias = (*buffers, None)[:2]
                assert weight is not None
                product = Product(weight, bias, [linear.out_features for linear in group])
                for index, linear in enumerate(group):
                    linear.__class__ = Part  # as torch's own parametrisations do
                    linear.product, linear.index = product, index  # type: ignore[assignment]


def _layers(model: PreTrainedModel) -> Iterator[list[list[nn.Linear]]]:
    """The groups of linear layers that read the same input, for each decoder layer.

    Those of cross-attention do not: keys and values are the image's.
    """
    cross_layers = family_of(model.config).cross_layers
    for index, layer in enumerate(model.get_decoder().layers):
        kinds = (MLP,) if index in cross_layers else (ATTENTION, MLP)
        groups = [
            [child for name in names if _is_plain(child := module._modules.get(name))]
            for module in layer.modules()
            for names in kinds
        ]
        yield [group for group in groups if len(group) > 1 and len(set(map(_kind, group))) == 1]


def _is_plain(module: object) -> TypeGuard[nn.Linear]:
    """Whether it is a linear layer and nothing more: not adapted, quantised, sharded or parametrised.

    A hook may write into what the layers behind it read.
    """
    return (
        type(module) is nn.Linear
        and not (module._forward_hooks or module._forward_pre_hooks)
        and all(each is None or type(each) is nn.Parameter for each in (module.weight, module.bias))
    )


def _kind(linear: nn.Linear) -> tuple[object, ...]:
    """What linear layers must have in common to have one product."""
    weight, bias = linear.weight, linear.bias
    return weight.shape[1:], weight.dtype, weight.device, None if bias is None else (bias.dtype, bias.device)


def _columns(group: Sequence[nn.Linear]) -> list[list[nn.Parameter]]:
    """The weights of ``group``, and its biases if it has some."""
    names = ("weight",) if group[0].bias is None else ("weight", "bias")
    return [[linear.get_parameter(name) for linear in group] for name in names]


def _may_move(parameter: nn.Parameter) -> bool:
    if parameter.is_meta or parameter.is_inference() or not parameter.is_contiguous():
        return False
    storage = parameter.untyped_storage()
    is_alone = torch._C._storage_Use_Count(storage._cdata) == 2  # the parameter, and ``storage``
    is_shared = parameter.device.type == "cpu" and storage.is_shared()  # with other processes
    return is_alone and not is_shared and storage.nbytes() == parameter.nbytes and not parameter.nbytes % ALIGNMENT


def _gather(parameters: Sequence[nn.Parameter]) -> None:
    """Move ``parameters`` into a new buffer.

    Each keeps a storage of its own size, which begins inside of the buffer and keeps it alive. As views of one storage
    they would be saved as a whole wherever one of them is, and transformers copies what shares a storage to save it.
    """
    first = parameters[0]
    buffer = torch.empty(sum(map(len, parameters)), *first.shape[1:], dtype=first.dtype, device=first.device)
    for parameter, part in zip(parameters, buffer.split([*map(len, parameters)])):
        part.copy_(parameter.data)
        parameter.data = alias(part)
        parameter.untyped_storage().buffer = buffer  # type: ignore[attr-defined]


def _buffer(parameters: Sequence[nn.Parameter]) -> torch.Tensor | None:
    """The buffer that ``parameters`` lie in, one behind the other and with nothing else, if there is one."""
    buffer: torch.Tensor | None = getattr(parameters[0].untyped_storage(), "buffer", None)
    if buffer is None or sum(map(len, parameters)) != len(buffer):
        return None
    for parameter, part in zip(parameters, buffer.split([*map(len, parameters)])):
        if (place(parameter), parameter.dtype) != (place(part), part.dtype):
            return None
    return buffer
