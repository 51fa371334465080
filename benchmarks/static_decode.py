"""Decode with transformers in its fastest form: a static KV cache, no wait for the host, and one CUDA graph a step.

On a GPU a loop over ``model.generate`` spends most of a step in Python. So the engine must also be compared with a loop
that does not. transformers has none for Mllama. Before 5.24 it has no static cache for it either, because the layers
that attend to the image have another length than the others. ``StaticDecoder`` is built from parts of transformers: the
model as it is, a ``StaticLayer`` for each self-attention layer, and a ``DynamicLayer`` with the image's keys and values
for each cross-attention layer. Where there is a choice, it takes the faster one:

- The prompt and its image are computed once, at batch 1, and copied to the N rows.
- The padding tiles of the image are then dropped from the cache, which is exact. So SDPA needs no mask there.
- The mask of the other layers is made once a step, in the form that SDPA needs, and not in every layer.
- Tokens are drawn on the device, and stop tokens are looked for only at the end.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, StaticLayer

from llava_cot.engine.compile import compiled, number
from llava_cot.engine.graphs import open_recorder
from llava_cot.engine.model import cache_parameter, copy_around_tensors

MASK_ALIGNMENT = 8  # entries of a row; otherwise SDPA copies the mask in every layer


@dataclass
class Prompt:
    """A prompt that is computed up to its last token, at batch 1, before anything is drawn."""

    cache: DynamicCache
    last_token: int
    length: int  # tokens, including the last one
    tiles: int  # tiles of the image that are kept


class HostLengthLayer(StaticLayer):
    """Answers on the host whether it holds tokens: transformers 5.17 asks in each layer, and would wait otherwise."""

    def get_seq_length(self) -> int:
        return self.max_cache_len  # any number will do, since mask and positions are given


def prefill(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Prompt:
    """Compute a prompt from the inputs of a processor at batch 1."""
    ids, mask = inputs["input_ids"], inputs["cross_attention_mask"]
    image = {name: inputs[name] for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")}
    cache = DynamicCache(config=model.config.get_text_config())
    _forward(model, cache, input_ids=ids[:, :-1], cross_attention_mask=mask[:, :-1], **image)
    visible = mask[0, -1].flatten().bool()
    for index in model.config.text_config.cross_attention_layers:
        layer = cache.layers[index]  # keys and values: [1, Hkv, images * tiles * patches, D]
        tiles = (tensor.unflatten(2, (len(visible), -1)) for tensor in (layer.keys, layer.values))
        layer.keys, layer.values = (tensor[:, :, visible].flatten(2, 3) for tensor in tiles)
    return Prompt(cache, int(ids[0, -1]), ids.shape[1], int(visible.sum()))


class StaticDecoder:
    """Draws ``n`` continuations of one prompt, each of up to ``max_new_tokens`` tokens; temperature 0 is greedy.

    ``step()`` computes and draws one token of each row. On CUDA it replays a graph, and the host does not wait for it.
    It may be called ``max_new_tokens`` times after a ``begin``. ``compile`` makes torch compile the decoder layers.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        inputs: dict[str, Tensor] | Prompt,
        n: int,
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        compile: bool = False,
    ):
        self.model, self.n, self.max_new_tokens = model, n, max_new_tokens
        self.temperature, self.top_p = temperature, top_p
        self.prompt = inputs if isinstance(inputs, Prompt) else prefill(model, inputs)
        device, most = model.device, self.prompt.length + max_new_tokens
        self.places = torch.arange(-(-most // MASK_ALIGNMENT) * MASK_ALIGNMENT, device=device)
        self.position, self.index = torch.zeros(2, 1, dtype=torch.int64, device=device)
        self.token = torch.zeros(n, 1, dtype=torch.int64, device=device)
        self.drawn = torch.zeros(n, max_new_tokens, dtype=torch.int64, device=device)
        self.cache = Cache(layers=[self._open(index, layer) for index, layer in enumerate(self.prompt.cache.layers)])
        self.decoding = _compiled(model, self.cache) if compile else model
        self.begin()
        self._recorder = open_recorder(device)
        self.step = self._recorder.capture(self._step)

    @torch.inference_mode()
    def _open(self, index: int, layer: Any) -> Any:
        """Copy a layer to ``n`` rows at fixed addresses."""
        keys, values = (tensor.expand(self.n, -1, -1, -1) for tensor in (layer.keys, layer.values))
        if index in self.model.config.text_config.cross_attention_layers:
            image = DynamicLayer()
            image.update(keys, values)
            return image
        static = HostLengthLayer(max_cache_len=len(self.places))
        static.lazy_initialization(keys, values)
        for tensor in (static.keys, static.values, static.cumulative_length):
            torch._dynamo.mark_static_address(tensor, guard=False)  # else each layer compiles for its own addresses
        return static

    @torch.inference_mode()
    def load(self, prompt: Prompt) -> None:
        """Replace the prompt by one with as many tokens and tiles, and begin with it."""
        if (prompt.length, prompt.tiles) != (self.prompt.length, self.prompt.tiles):
            expected = f"{self.prompt.length} tokens and {self.prompt.tiles} tiles"
            raise ValueError(f"prompt must have {expected}, got {prompt.length} and {prompt.tiles}")
        self.prompt = prompt
        for index in self.model.config.text_config.cross_attention_layers:
            self.cache.layers[index].keys.copy_(prompt.cache.layers[index].keys)
            self.cache.layers[index].values.copy_(prompt.cache.layers[index].values)
        self.begin()

    @torch.inference_mode()
    def begin(self, prefix: Sequence[int] = ()) -> None:
        """Start again from the prompt and ``prefix``, whose tokens count as drawn and are computed once, at batch 1."""
        known, start = [self.prompt.last_token, *prefix], self.prompt.length - 1
        end = start + len(prefix)
        if prefix:  # without a mask, SDPA would make the attention to the image causal
            ids = torch.tensor([known[:-1]], device=self.model.device)
            mask = ids.new_ones(1, end, 1, self.prompt.tiles)
            _forward(self.model, self.prompt.cache, input_ids=ids, cross_attention_mask=mask)
        for index in _self_layers(self.model):
            source, target = self.prompt.cache.layers[index], self.cache.layers[index]
            target.keys[:, :, :end], target.values[:, :, :end] = source.keys, source.values
            target.cumulative_length.fill_(end)
            source.keys, source.values = source.keys[:, :, :start], source.values[:, :, :start]
        self.token.fill_(known[-1])
        self.position.fill_(end)
        self.index.fill_(0)

    def run(self, tokens: int, prefix: Sequence[int] = ()) -> Tensor:
        """Draw the next ``tokens`` ids of each row after the prompt and ``prefix``: int64 [n, tokens]."""
        if not 0 <= tokens <= self.max_new_tokens - len(prefix):
            raise ValueError(f"tokens must be in [0, {self.max_new_tokens - len(prefix)}], got {tokens}")
        self.begin(prefix)
        for _ in range(tokens):
            self.step()
        return self.drawn[:, :tokens].clone()

    def _step(self) -> None:
        mask = torch.zeros(1, 1, 1, len(self.places), dtype=self.model.dtype, device=self.model.device)
        mask.masked_fill_(self.places > self.position, torch.finfo(mask.dtype).min)
        position = self.position.unsqueeze(0)
        logits = _forward(self.decoding, self.cache, input_ids=self.token, position_ids=position, attention_mask=mask)
        self.token.copy_(self._draw(logits[:, -1].float()))
        self.drawn.index_copy_(1, self.index, self.token)
        self.position.add_(1)
        self.index.add_(1)

    @torch.inference_mode()
    def _draw(self, logits: Tensor) -> Tensor:
        if self.temperature == 0:
            return logits.argmax(-1, keepdim=True)
        probs, tokens = torch.softmax(logits / self.temperature, -1).sort(-1, descending=True)
        probs.masked_fill_(probs.cumsum(-1) - probs >= self.top_p, 0.0)
        # The largest of probs / exponential draws is a token with the probability of that token. multinomial would
        # wait.
        return tokens.gather(1, (probs / torch.empty_like(probs).exponential_()).argmax(-1, keepdim=True))


@torch.inference_mode()
def _forward(model: PreTrainedModel, cache: Cache, **inputs: Tensor) -> Tensor:
    """Return the logits after the last token."""
    return model(**inputs, **{cache_parameter(model): cache}, use_cache=True, logits_to_keep=1).logits


def _self_layers(model: PreTrainedModel) -> list[int]:
    text = model.config.text_config
    return [index for index in range(text.num_hidden_layers) if index not in text.cross_attention_layers]


def _compiled(model: PreTrainedModel, cache: Cache) -> PreTrainedModel:
    """Return a copy that shares the tensors of ``model`` and has compiled decoder layers."""
    model, parameter = copy_around_tensors(model), cache_parameter(model)
    for layer, of_layer in zip(model.model.language_model.layers, cache.layers):
        number(layer, 0)
        layer.forward = partial(_forward_layer, compiled(layer.forward, model.device.type), parameter, of_layer)
    return model


def _forward_layer(forward: Any, parameter: str, of_layer: Any, *args: Any, **kwargs: Any) -> Any:
    kwargs[parameter] = Cache(layers=[of_layer])
    return forward(*args, **kwargs)
