"""Fewer, larger kernels in a decode step: ``torch.compile`` of blocks of decoder layers, once for all of a kind."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.fx.experimental._config
from torch import nn
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from llava_cot.engine.batch import Batch
from llava_cot.engine.fused import Part

BLOCK_LAYERS = 4  # at least so many are compiled as one: kernels of two layers are fused only within a block
CUDA_OPTIONS: dict[str, Any] = {"combo_kernels": True}  # one launch for kernels that need nothing of each other
MAX_PERIOD = 8  # layers after which the kinds of layers repeat; of a model with a longer period each is compiled alone


def has_hooked_layers(model: PreTrainedModel) -> bool:
    """Whether a hook is called with what a decoder layer gets or returns, which has no place within a block.

    transformers' own hooks do nothing in a step.
    """
    return any(
        getattr(hook, "__module__", None) != "transformers.utils.output_capturing"
        for layer in model.get_decoder().layers
        for hook in (*layer._forward_pre_hooks.values(), *layer._forward_hooks.values())
    )


class CompiledSteps:
    """Compiles the text model of ``model``, the engine's own copy, for passes of one token per sequence.

    Other passes run as before. ``is_step`` must say which of the two the next pass is.
    """

    def __init__(self, model: PreTrainedModel, cache_parameter: str) -> None:
        self.is_step = False
        self.device_type = model.device.type
        text = model.get_decoder()
        text.rotary_emb.forward = partial(self._choose, text.rotary_emb.forward, self.compile(text.rotary_emb.forward))
        for part in text.modules():
            if isinstance(part, Part):
                for tensor in filter(torch.is_tensor, (part.product.weight, part.product.bias)):
                    torch._dynamo.mark_static(tensor)  # as parameters are
        layers, run = [*text.layers], self.compile(_run)
        size = block_size([_kind(layer) for layer in layers])
        for layer in layers[::size]:
            layer.input_layernorm = _Norm(layer.input_layernorm)  # type: ignore[arg-type]
        text.norm = _Norm(text.norm)
        norms = [*(layer.input_layernorm for layer in layers[::size]), text.norm]
        first_norm = self.compile(norms[0].norm.forward)
        for first, *ends in zip(range(0, len(layers), size), norms, norms[1:]):
            _Block(layers[first : first + size], first, ends, cache_parameter, run, None if first else first_norm)

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, compiled for the device of the model and for any sizes."""
        return compiled(function, self.device_type)

    def _choose(self, plain: Callable[..., Any], compiled: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return (compiled if self.is_step else plain)(*args, **kwargs)


def block_size(kinds: list[Any]) -> int:
    """How many layers to compile as one: whole periods of ``kinds``, so that blocks are alike."""
    for period in range(1, MAX_PERIOD + 1):
        if kinds[period:] == kinds[:-period]:
            return -(-BLOCK_LAYERS // period) * period
    return 1


def _kind(layer: nn.Module) -> Any:
    """Layers of one kind run the same code."""
    return [(type(module), getattr(module, "sliding_window", None)) for module in layer.modules()]


class _Norm(nn.Module):
    """The norm that a block begins with, or the model ends with.

    In a step the block before has computed it already, in one kernel with its own last sum. Its result is ``ahead``.
    """

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.ahead: torch.Tensor | None = None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        ahead, self.ahead = self.ahead, None
        return self.norm(hidden_states) if ahead is None else ahead


class _Block:
    """Consecutive decoder layers. The model calls one after another, and in a step they are computed as one.

    Until the last of them is called, each keeps what it was called with and returns the hidden states that it was
    given. What is compiled depends on nothing but shapes, so that all blocks of a kind share it: a layer has its number
    in the block, and the cache that it is given is that of the block.
    """

    def __init__(
        self,
        layers: list[nn.Module],
        first: int,
        norms: list[_Norm],
        cache_parameter: str,
        run: Callable[..., Any],
        first_norm: Callable[..., torch.Tensor] | None,
    ) -> None:
        self.layers, self.first, self.cache_parameter, self.run = layers, first, cache_parameter, run
        self.norm, self.next_norm = norms
        self.first_norm = first_norm
        self.calls: list[dict[str, Any]] = []
        for index, layer in enumerate(layers):
            number(layer, index)
            layer.forward = partial(self.forward, index, layer.forward)

    def forward(
        self,
        index: int,
        plain: Callable[..., torch.Tensor],
        hidden_states: torch.Tensor,
        *,
        paged_batch: Batch,
        paged_layers: list[CacheLayerMixin],
        **kwargs: Any,
    ) -> torch.Tensor:
        """Stands in for that of layer ``index``, which is ``plain``."""
        layers = paged_layers[self.first :][: len(self.layers)]
        shared = {self.cache_parameter: Cache(layers=layers), "paged_batch": paged_batch, "paged_layers": layers}
        if not paged_batch.is_step:
            self.norm.ahead = self.next_norm.ahead = None  # of a step that was interrupted
            return plain(hidden_states, **kwargs | shared)
        self.calls = [*self.calls[:index], kwargs]
        if index + 1 < len(self.layers):
            return hidden_states
        calls, self.calls = [call | shared for call in self.calls], []
        assert len(calls) == len(self.layers)
        for layer in layers:
            layer.prepare_to_compile()  # type: ignore[attr-defined]
        ahead, self.norm.ahead = self.norm.ahead, None
        if self.first_norm is not None:
            ahead = self.first_norm(hidden_states)
        hidden_states, self.next_norm.ahead = self.run(self.layers, hidden_states, ahead, calls, self.next_norm.norm)
        return hidden_states


def _run(
    layers: list[nn.Module],
    hidden_states: torch.Tensor,
    ahead: torch.Tensor,
    calls: list[dict[str, Any]],
    next_norm: nn.Module,
) -> tuple[torch.Tensor, torch.Tensor]:
    layers[0].input_layernorm.ahead = ahead  # type: ignore[union-attr, assignment]
    for layer, kwargs in zip(layers, calls):
        hidden_states = type(layer).forward(layer, hidden_states, **kwargs)
    return hidden_states, next_norm(hidden_states)


def number(layer: nn.Module, index: int) -> None:
    """Let ``layer`` find its keys and values in layer ``index`` of the cache that it is given."""
    for module in layer.modules():
        if hasattr(module, "layer_idx"):
            module.layer_idx = index  # type: ignore[assignment]


def compiled(function: Callable[..., Any], device_type: str) -> Callable[..., Any]:
    """``function``, compiled for any sizes. On CUDA kernels that do not depend on each other are launched as one."""
    options = CUDA_OPTIONS if device_type == "cuda" else None
    return partial(_call, torch.compile(function, dynamic=True, options=options))


# Kinds of blocks, times a row or many, times no, one or many shared prefixes; as many rows as heads means nothing.
@torch._dynamo.config.patch(recompile_limit=64, specialize_float=True)
@torch.fx.experimental._config.patch(use_duck_shape=False)  # type: ignore[attr-defined]
def _call(compiled: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return compiled(*args, **kwargs)
