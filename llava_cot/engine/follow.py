"""Tell whether a model is still as it was when the engine copied its module tree."""

from typing import Any, NamedTuple

import torch
from torch import nn

OF_EVERY_MODULE = frozenset(vars(nn.Module()))  # such as ``training`` and the tables of parameters and hooks


class ModuleState(NamedTuple):
    """What a copy of a module depends on. Tensors are compared by identity: their values are shared with the copy."""

    name: str
    kind: type
    tensors: tuple[tuple[str, int, torch.dtype, torch.device], ...]
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
                tuple((key, id(t), t.dtype, t.device) for key, t in tensors if t is not None),
                (*module._forward_hooks, *module._forward_pre_hooks),
                tuple((key, _frozen(v)) for key, v in own.items() if key not in OF_EVERY_MODULE and _is_plain(v)),
            )
        )
    return found


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, value)) and all(map(_is_plain, value.values()))
    return value is None or isinstance(value, (bool, int, float, str))


def _frozen(value: Any) -> Any:
    """Return a copy that later changes of ``value`` leave alone."""
    if isinstance(value, (list, tuple)):
        return tuple(map(_frozen, value))
    if isinstance(value, (set, frozenset)):
        return frozenset(value)
    if isinstance(value, dict):
        return tuple((key, _frozen(item)) for key, item in value.items())
    return value
