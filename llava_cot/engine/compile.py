"""Fewer, larger kernels in a decode step: ``torch.compile`` of each kind of decoder layer, once for all of a kind."""

from functools import partial
from typing import Any

import torch
import torch.fx.experimental._config
from transformers import Cache, PreTrainedModel


def compile_layers(model: PreTrainedModel, cache_parameter: str) -> None:
    """Compile the decoder layers of ``model``, the engine's own copy, for passes of one token per sequence.

    What is compiled depends on nothing but shapes: a layer does not know its number, and gets a cache of itself alone.
    """
    for index, layer in enumerate(model.model.language_model.layers):
        attention = layer.cross_attn if hasattr(layer, "cross_attn") else layer.self_attn
        attention.layer_idx = 0
        compiled = torch.compile(layer.forward, dynamic=True)
        layer.forward = partial(_forward, layer.forward, compiled, index, cache_parameter)


# Kinds of layers, times a row or many, times no, one or many shared prefixes; as many rows as heads means nothing.
@torch._dynamo.config.patch(recompile_limit=64)
@torch.fx.experimental._config.patch(use_duck_shape=False)  # type: ignore[attr-defined]
def _forward(plain, compiled, index: int, cache_parameter: str, *args, paged_batch, paged_layers, **kwargs) -> Any:
    layer = paged_layers[index]
    kwargs[cache_parameter] = Cache(layers=[layer])
    is_decoding = not paged_batch.is_prefill and paged_batch.cu_seqlens_q is None
    forward = compiled if is_decoding else plain
    return forward(*args, paged_batch=paged_batch, paged_layers=[layer], **kwargs)
