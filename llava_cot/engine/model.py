"""The engine's view of a transformers model: the same weights behind our attention function."""

import copy
from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from llava_cot.engine.attention import NAME
from llava_cot.engine.batch import Batch
from llava_cot.engine.cache import PagedCache
from llava_cot.engine.images import ImageStore

CPU_KV_BYTES = 2 << 30  # address space: only pages that were written become resident
CUDA_KV_SHARE = 0.5  # of the memory that is free once the weights are there


def _kv_budget(device: torch.device) -> int:
    """Bytes for the page pool when the caller names no number of pages."""
    return int(torch.cuda.mem_get_info(device)[0] * CUDA_KV_SHARE) if device.type == "cuda" else CPU_KV_BYTES


class Prefilled(NamedTuple):
    """What a prompt leaves behind, besides its keys and values in the pages."""

    logits: torch.Tensor  # [V], of the next token
    image: int = -1  # the image's segment in the store, if the model has cross-attention
    position_offset: int = 0  # from a later token's index to its rotary position


class ModelView(ABC):
    """Runs a model on flattened batches: a copy of the caller's model that shares every tensor with it.

    The families differ in where a prompt's image goes, and so in ``prefill`` alone: decoding is the same for all.
    """

    cross_layers: tuple[int, ...] = ()  # indices of the layers that attend to the image store

    def __init__(self, model: PreTrainedModel, page_size: int, num_pages: int | None):
        tensors = [*model.parameters(), *model.buffers()]
        self._model = copy.deepcopy(model, memo={id(tensor): tensor for tensor in tensors}).eval()
        self._model.set_attn_implementation({"text_config": NAME})
        text = model.config.text_config
        self.vocab_size = text.vocab_size
        self.dtype, self.device = model.dtype, model.device
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        heads = (text.num_key_value_heads, head_dim)
        num_self_layers = text.num_hidden_layers - len(self.cross_layers)
        if num_pages is None:
            page_bytes = 2 * num_self_layers * page_size * heads[0] * heads[1] * self.dtype.itemsize
            num_pages = max(1, _kv_budget(self.device) // page_bytes)
        self.num_pages = num_pages
        shape = (2, num_self_layers, num_pages, page_size, *heads)
        self.kv_cache = torch.empty(shape, dtype=self.dtype, device=self.device)
        self.images = ImageStore(len(self.cross_layers), *heads, self.dtype, self.device)

    @abstractmethod
    def prefill(self, inputs: dict[str, torch.Tensor], batch: Batch) -> Prefilled:
        """Run one prompt with its image; ``inputs`` are the processor's for one sample, without padding."""

    def decode(self, token_ids: torch.Tensor, positions: torch.Tensor, batch: Batch) -> torch.Tensor:
        """T tokens of B sequences at their rotary positions, int64 [T] each; their next-token logits [T, V]."""
        rows = {"input_ids": token_ids.unsqueeze(0), "position_ids": positions.unsqueeze(0)}
        return self._forward(self._cache(batch), batch, **rows)[0]

    def _cache(self, batch: Batch) -> PagedCache:
        return PagedCache(self.kv_cache, self.images, self.cross_layers, batch)

    @torch.inference_mode()
    def _forward(self, cache: PagedCache, batch: Batch, **inputs) -> torch.Tensor:
        return self._model(
            **inputs, past_key_values=cache, use_cache=True, paged_batch=batch, paged_layers=cache.layers
        ).logits


class CrossAttentionView(ModelView):
    """Mllama: text tokens attend to the image in layers of their own; its keys and values go to the image store."""

    def __init__(self, model: PreTrainedModel, page_size: int, num_pages: int | None):
        self.cross_layers = tuple(model.config.text_config.cross_attention_layers)
        super().__init__(model, page_size, num_pages)

    def prefill(self, inputs: dict[str, torch.Tensor], batch: Batch) -> Prefilled:
        cache = self._cache(batch)
        positions = torch.arange(inputs["input_ids"].shape[1], device=self.device).unsqueeze(0)
        logits = self._forward(cache, batch, position_ids=positions, logits_to_keep=1, **inputs)
        key_value = torch.stack(
            [
                torch.stack([getattr(cache.layers[index], name)[0].transpose(0, 1) for index in self.cross_layers])
                for name in ("keys", "values")
            ]
        )  # [2, num_cross_layers, images * tiles * patches, Hkv, D]
        # What the last prompt token may see is what every later token sees; padding tiles leave here.
        visible = inputs["cross_attention_mask"][0, -1].flatten().bool()
        key_value = key_value.unflatten(2, (visible.numel(), -1))[:, :, visible].flatten(2, 3)
        return Prefilled(logits[0, -1], self.images.add(key_value))


class TextPrefixView(ModelView):
    """LLaVA, Qwen2.5-VL: the image is tokens of the prompt, and so pages that every branch shares."""

    def __init__(self, model: PreTrainedModel, page_size: int, num_pages: int | None):
        text = model.config.text_config
        kinds = getattr(text, "layer_types", None) or ["full_attention"]
        if getattr(text, "sliding_window", None) or set(kinds) != {"full_attention"}:
            # The pages would be read from the first token on all the same: an answer, but another one.
            raise ValueError(f"model must have full attention in every layer, got {text.model_type} with a window")
        super().__init__(model, page_size, num_pages)

    def prefill(self, inputs: dict[str, torch.Tensor], batch: Batch) -> Prefilled:
        ids, offset = inputs["input_ids"], 0
        positions = torch.arange(ids.shape[1], device=self.device).unsqueeze(0)
        if "image_grid_thw" in inputs:  # M-RoPE: positions [3, 1, T], in which an image counts as its longer side
            is_image = (ids == self._model.config.image_token_id).int()
            positions, deltas = self._model.model.get_rope_index(ids, is_image, image_grid_thw=inputs["image_grid_thw"])
            offset = int(deltas)
        logits = self._forward(self._cache(batch), batch, position_ids=positions, logits_to_keep=1, **inputs)
        return Prefilled(logits[0, -1], position_offset=offset)


VIEWS: dict[str, type[ModelView]] = {
    "mllama": CrossAttentionView,
    "llava": TextPrefixView,
    "qwen2_5_vl": TextPrefixView,
}


def open_view(model: PreTrainedModel, page_size: int, num_pages: int | None) -> ModelView:
    """The view that fits the model's family."""
    model_type = model.config.model_type
    if model_type not in VIEWS:
        raise ValueError(f"model must be one of {sorted(VIEWS)}, got model_type {model_type!r}")
    return VIEWS[model_type](model, page_size, num_pages)
