"""Fewer, larger kernels in a decode step: ``torch.compile`` of each kind of decoder layer, once for all of a kind."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.fx.experimental._config
import torch.utils.dlpack
from torch import nn
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from llava_cot.engine.batch import Batch
from llava_cot.engine.cache import PagedLayer


def compile_layers(model: PreTrainedModel, cache_parameter: str) -> None:
    """Compile the decoder layers of ``model``, the engine's own copy, for passes of one token per sequence."""
    for index, layer in enumerate(model.model.language_model.layers):
        plain, compiled = layer.forward, compile_layer(layer)
        layer.forward = partial(_forward, plain, compiled, index, cache_parameter)


def compile_layer(layer: nn.Module) -> Callable[..., Any]:
    """``layer.forward``, compiled; it must be given a cache of this layer alone.

    What is compiled depends on nothing but shapes, so that all layers of a kind share it: the layer forgets its number.
    """
    for module in layer.modules():
        if hasattr(module, "layer_idx"):
            module.layer_idx = 0  # type: ignore[assignment]
    return partial(_call, torch.compile(layer.forward, dynamic=True))


# Kinds of layers, times a row or many, times no, one or many shared prefixes; as many rows as heads means nothing.
@torch._dynamo.config.patch(recompile_limit=64)
@torch.fx.experimental._config.patch(use_duck_shape=False)  # type: ignore[attr-defined]
def _call(compiled: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return compiled(*args, **kwargs)


def _without_offset(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as a tensor of its own.

    Inductor finds what an op writes by its offset in the storage, which it takes from the layer that it compiles. So
    the layers after it would write to other places, were that layer not the first in the storage (torch 2.11 to 2.13).
    """
    return torch.from_dlpack(torch.utils.dlpack.to_dlpack(tensor))


def _forward(
    plain: Callable[..., Any],
    compiled: Callable[..., Any],
    index: int,
    cache_parameter: str,
    *args: Any,
    paged_batch: Batch,
    paged_layers: list[CacheLayerMixin],
    **kwargs: Any,
) -> Any:
    layer = paged_layers[index]
    kwargs[cache_parameter] = Cache(layers=[layer])
    is_decoding = not paged_batch.is_prefill and paged_batch.cu_seqlens_q is None
    if is_decoding and isinstance(layer, PagedLayer):
        layer.kv_cache = _without_offset(layer.kv_cache)
    forward = compiled if is_decoding else plain
    return forward(*args, paged_batch=paged_batch, paged_layers=[layer], **kwargs)
