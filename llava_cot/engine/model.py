"""The engine's view of a transformers model: the same weights behind our attention function."""

import copy

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


class ModelView:
    """Runs an Mllama on flattened batches: a copy of the caller's model that shares every tensor with it."""

    def __init__(self, model: PreTrainedModel, page_size: int, num_pages: int | None):
        if model.config.model_type != "mllama":
            raise ValueError(f"model must be an Mllama (Llama 3.2 Vision), got model_type {model.config.model_type!r}")
        tensors = [*model.parameters(), *model.buffers()]
        self._model = copy.deepcopy(model, memo={id(tensor): tensor for tensor in tensors}).eval()
        self._model.set_attn_implementation({"text_config": NAME})
        text = model.config.text_config
        self.cross_layers = list(text.cross_attention_layers)
        self.vocab_size = text.vocab_size
        self.dtype, self.device = model.dtype, model.device
        heads = (text.num_key_value_heads, text.hidden_size // text.num_attention_heads)
        num_self_layers = text.num_hidden_layers - len(self.cross_layers)
        if num_pages is None:
            page_bytes = 2 * num_self_layers * page_size * heads[0] * heads[1] * self.dtype.itemsize
            num_pages = max(1, _kv_budget(self.device) // page_bytes)
        self.num_pages = num_pages
        shape = (2, num_self_layers, num_pages, page_size, *heads)
        self.kv_cache = torch.empty(shape, dtype=self.dtype, device=self.device)
        self.images = ImageStore(len(self.cross_layers), *heads, self.dtype, self.device)

    def prefill(self, inputs: dict[str, torch.Tensor], batch: Batch) -> tuple[torch.Tensor, int]:
        """Run one prompt with its image; returns (next-token logits [V], the image's segment in the store).

        ``inputs`` are the processor's for one sample, without padding.
        """
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
        return logits[0, -1], self.images.add(key_value)

    def decode(self, token_ids: list[int], positions: list[int], batch: Batch) -> torch.Tensor:
        """One token of each of B sequences; returns their next-token logits [B, V]."""
        ids = torch.tensor([token_ids], device=self.device)
        position_ids = torch.tensor([positions], device=self.device)
        return self._forward(self._cache(batch), batch, input_ids=ids, position_ids=position_ids)[0]

    def _cache(self, batch: Batch) -> PagedCache:
        return PagedCache(self.kv_cache, self.images, self.cross_layers, batch)

    @torch.inference_mode()
    def _forward(self, cache: PagedCache, batch: Batch, **inputs) -> torch.Tensor:
        return self._model(
            **inputs, past_key_values=cache, use_cache=True, paged_batch=batch, paged_layers=cache.layers
        ).logits
