"""Tell whether a model is still as it was when the engine copied its module tree."""

from types import NoneType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

Place = tuple[int, torch.Size, tuple[int, ...]]

NOT_PLAIN = object()
OF_EVERY_MODULE = frozenset(vars(nn.Module()))  # such as ``training`` and the tables of parameters and hooks


class ModuleState(NamedTuple):
    """What a copy of a module depends on. Tensors are compared by identity and by place: fused weights and captured
    graphs read the memory itself. The values that are there are shared with the copy.
    """

    name: str
    kind: type
    tensors: tuple[tuple[str, int, torch.dtype, torch.device, Place], ...]
    hooks: tuple[int, ...]  # ids of the forward hooks
    settings: tuple[tuple[str, Any], ...]  # attributes that are plain data, such as which adapters are active


def state_of(model: nn.Module) -> list[ModuleState]:
    """Return the state of every module of ``model``.

    Raises:
        ValueError: the ``forward`` of a module was replaced on the instance, as torch.compile, accelerate and tracers
            do. A copy of such a module would still call the original.
    """
    found = []
    for name, module in model.named_modules():
        own = vars(module)
        if "forward" in own:
            raise ValueError(
                f"model must not have a replaced forward, got one on {name or 'the model'!r}: "
                "unwrap it, and use EngineConfig(compile=True) to compile its layers"
            )
        tensors = (*module._parameters.items(), *module._buffers.items())
        found.append(
            ModuleState(
                name,
                type(module),
                tuple((key, id(t), t.dtype, t.device, place(t)) for key, t in tensors if t is not None),
                (*module._forward_hooks, *module._forward_pre_hooks),
                tuple(
                    (key, plain)
                    for key, value in own.items()
                    if key not in OF_EVERY_MODULE and (plain := _frozen(value)) is not NOT_PLAIN
                ),
            )
        )
    return found


def place(tensor: torch.Tensor) -> Place:
    """The address of the first element, and how the others follow; that of one with several parts is not known."""
    address = 0 if is_traceable_wrapper_subclass(tensor) else tensor.data_ptr()
    return address, tensor.shape, tensor.stride()


def _frozen(value: Any) -> Any:
    """Return a copy of plain data that later changes of it leave alone, and ``NOT_PLAIN`` for anything else."""
    kind = type(value)  # asking a configuration object for its class is slow
    if issubclass(kind, dict):
        return _frozen([*value.items()])
    if issubclass(kind, (list, tuple, set, frozenset)):
        parts = [_frozen(part) for part in value]
        if any(part is NOT_PLAIN for part in parts):
            return NOT_PLAIN
        return frozenset(parts) if issubclass(kind, (set, frozenset)) else tuple(parts)
    return value if issubclass(kind, (bool, int, float, str, NoneType)) else NOT_PLAIN
