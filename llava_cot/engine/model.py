"""The engine's view of a transformers model: the same weights behind our attention function."""

import copy
import inspect
import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.utils.deterministic
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from llava_cot.engine.attention import NAME
from llava_cot.engine.batch import Batch, Masks
from llava_cot.engine.cache import PagedCache
from llava_cot.engine.canary import Canary
from llava_cot.engine.compile import CompiledSteps, has_hooked_layers
from llava_cot.engine.config import EngineConfig
from llava_cot.engine.fused import fuse_products
from llava_cot.engine.images import ImageStore
from llava_cot.engine.linear import use_kernel
from llava_cot.families import Prompt, family_of
from llava_cot_kernels.checks import FLOATS

CPU_BYTES = 2 << 30  # address space, for pages and for images: only what was written becomes resident
CUDA_PAGES_SHARE, CUDA_IMAGES_SHARE = 0.5, 0.2  # of the memory that is free once the weights are there
LAYER_KINDS = {"full_attention", "sliding_attention"}
NEEDS = {  # what the engine lacks for other kinds
    "linear_attention": "a recurrent state for each branch, copied at every fork",
    "conv": "the last inputs of the convolution for each branch, copied at every fork",
    "chunked_attention": "attention that begins at multiples of the chunk",
}
MAX_IMAGE_TOKENS = 1 << 20  # of the image store: 163 images of four tiles, more than run at once

logger = logging.getLogger(__name__)


def _budget(device: torch.device) -> tuple[int, int]:
    """Bytes for the pages, when the caller names no number of them, and for the images' keys and values."""
    if device.type != "cuda":
        return CPU_BYTES, CPU_BYTES
    free = torch.cuda.mem_get_info(device)[0]
    return int(free * CUDA_PAGES_SHARE), int(free * CUDA_IMAGES_SHARE)


class Prefilled(NamedTuple):
    """What a prompt leaves behind, besides its keys and values in the pages."""

    logits: torch.Tensor  # [V], of the next token
    image: int  # the segment of its images in the store; -1 if it has none, or the model has no cross-attention
    position_offset: int  # from a later token's index to its rotary position


def copy_around_tensors(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the module tree that shares with ``model`` every tensor and what a tensor holds, such as its scales."""
    tensors = [*model.parameters(), *model.buffers()]
    held = [each for tensor in tensors for each in vars(tensor).values() if not isinstance(each, torch.nn.Module)]
    return copy.deepcopy(model, memo={id(each): each for each in (*tensors, *held)})


def cache_parameter(model: PreTrainedModel) -> str:
    """The parameter of ``model.forward`` that takes the cache: its name changed in transformers 5.24."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


class ModelView:
    """Runs a model on flattened batches: a copy of the caller's model that shares every tensor with it.

    The families differ in where a prompt's image goes, and so in parts of ``prefill``: decoding is the same for all.

    Raises:
        ValueError: the model's family, its dtype or quantisation, or the kind of a layer is not supported. Or the
            configuration wants layers compiled that have hooks.
    """

    def __init__(self, model: PreTrainedModel, config: EngineConfig) -> None:
        self.family = family_of(model.config)
        self.cross_layers = self.family.cross_layers
        self._has_windows = _has_windows(model.config.text_config)
        if model.dtype not in FLOATS:
            raise ValueError(f"model must be in float32, bfloat16 or float16, got {model.dtype}")
        if getattr(model, "is_loaded_in_8bit", False):
            # Its forward pass takes weights out of their parameters, which the copy shares with the caller's model.
            raise ValueError("model must not be in bitsandbytes' 8 bits: use quantize='int8', or its 4 bits")
        self._model = copy_around_tensors(model).eval()
        self._model.set_attn_implementation({"text_config": NAME})
        fuse_products(self._model)
        self._cache_parameter = cache_parameter(self._model)
        use_kernel(self._model)
        page_size, num_pages = config.page_size, config.num_pages
        text = model.config.text_config
        self.vocab_size = text.vocab_size
        self.max_length: int | None = getattr(text, "max_position_embeddings", None)  # tokens of prompt and answer
        self.dtype, self.device = model.dtype, model.device
        is_hooked = has_hooked_layers(self._model)
        if config.compile and is_hooked:
            raise ValueError("model must have no hooks on its decoder layers with EngineConfig(compile=True)")
        is_compiled = (self.device.type == "cuda" and not is_hooked) if config.compile is None else config.compile
        self.compiled = CompiledSteps(self._model, self._cache_parameter) if is_compiled else None
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        heads = (text.num_key_value_heads, head_dim)
        num_cross = len(self.cross_layers)
        num_self = text.num_hidden_layers - num_cross
        for_pages, for_images = _budget(self.device)
        token_bytes = 2 * heads[0] * heads[1] * self.dtype.itemsize  # of a layer
        page_bytes = num_self * page_size * token_bytes
        self.num_pages = max(1, for_pages // page_bytes) if num_pages is None else num_pages
        shape = (2, num_self, self.num_pages + 1, page_size, *heads)  # slot -1, which is nowhere, is in the last page
        capacity = min(for_images // (num_cross * token_bytes), MAX_IMAGE_TOKENS) if num_cross else 0
        with _left_unwritten():
            try:
                self.kv_cache = torch.empty(shape, dtype=self.dtype, device=self.device)
            except RuntimeError as error:
                size = self.num_pages * page_bytes / 2**30
                raise ValueError(f"num_pages must fit into memory, got {self.num_pages}: {size:.1f} GiB") from error
            self.images = ImageStore(num_cross, *heads, capacity, self.dtype, self.device)
        self.canary = Canary(self.num_pages, page_size, self.device) if config.canary else None
        logger.info(
            "room for %d tokens in %d pages (%.2f GiB) and for %d image tokens (%.2f GiB)",
            *(self.num_pages * page_size, self.num_pages, self.num_pages * page_bytes / 2**30),
            *(capacity, capacity * num_cross * token_bytes / 2**30),
        )

    def image_tokens(self, prompt: Prompt) -> int:
        """How many tokens of the image store it takes."""
        return self.family.image_tokens(prompt)

    def prefill(
        self, prompts: list[Prompt], slot_mappings: list[torch.Tensor], words: list[torch.Tensor] | None = None
    ) -> list[Prefilled]:
        """Run prompts with their images in one pass; of several the image inputs must have one shape.

        Args:
            slot_mappings: int64 [T] for each prompt, where the keys and values of its tokens go.
            words: int64 [T, 2] for each prompt, what the canary writes there.
        """
        prompts = [{name: tensor.to(self.device) for name, tensor in prompt.items()} for prompt in prompts]
        inputs = self.family.stack(prompts)
        lengths = torch.tensor([prompt["input_ids"].shape[1] for prompt in prompts], device=self.device)
        slots = pad_sequence(slot_mappings, batch_first=True, padding_value=-1).flatten()
        masks = Masks(partial(self.family.prefill_mask, inputs))
        batch = Batch(slots.to(self.device), masks=masks)
        if self.canary is not None and words is not None:
            self.canary.write(pad_sequence(words, batch_first=True).flatten(0, 1).to(self.device), batch.slot_mapping)
        cache = PagedCache(self.kv_cache, self.images, self.cross_layers, batch)
        positions, offsets = self.family.positions(self._model, inputs, lengths)
        logits = self._forward(cache, position_ids=positions, logits_to_keep=lengths - 1, **inputs)
        if self._has_windows and not any(masks):
            raise ValueError(
                "model must tell its attention function the window of a layer, but "
                f"{self._model.config.text_config.model_type} does not"
            )
        kept = self._store_images(cache, prompts)
        return [Prefilled(logits[row, row].clone(), *rest) for row, rest in enumerate(zip(kept, offsets))]

    def decode(
        self, token_ids: torch.Tensor, positions: torch.Tensor, batch: Batch, *, with_logits: bool = True
    ) -> torch.Tensor:
        """T tokens of B sequences, int64 [T], at their rotary positions, int64 [T]: their next-token logits [T, V]."""
        if self.canary is not None and batch.trail is not None:
            self.canary.follow(token_ids, batch)
        cache = PagedCache(self.kv_cache, self.images, self.cross_layers, batch)
        keep = 0 if with_logits else token_ids.new_empty(0)
        rows = {"input_ids": token_ids.unsqueeze(0), "position_ids": positions.unsqueeze(0)}
        if batch.has_blind_rows:
            assert batch.image_group is not None
            rows |= self.family.blind_inputs(batch.image_group)
        return self._forward(cache, logits_to_keep=keep, **rows)[0]

    @torch.inference_mode()
    def _forward(self, cache: PagedCache, **inputs: object) -> torch.Tensor:
        inputs[self._cache_parameter] = cache
        if self.compiled is not None:
            self.compiled.is_step = cache.batch.is_step
        with self._without_autocast():
            return self._model(**inputs, use_cache=True, paged_batch=cache.batch, paged_layers=cache.layers).logits

    def _without_autocast(self) -> AbstractContextManager[None]:
        """Whoever steps the engine may have it on."""
        kind = self.device.type
        is_on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        return torch.autocast(kind, enabled=False) if is_on else nullcontext()

    def _store_images(self, cache: PagedCache, prompts: list[Prompt]) -> list[int]:
        """The segment of each prompt's images in the store; -1 if it has none, or the model has no cross-attention."""
        if not self.cross_layers or "pixel_values" not in prompts[0]:
            return [-1] * len(prompts)
        layers = [cache.layers[index] for index in self.cross_layers]
        segments = []
        for row, prompt in enumerate(prompts):
            key = torch.stack([layer.keys[row].transpose(0, 1) for layer in layers])
            value = torch.stack([layer.values[row].transpose(0, 1) for layer in layers])
            # [2, num_cross_layers, S, Hkv, D]
            kept = torch.stack([key, value])[:, :, self.family.stored_image_tokens(prompt)]
            segments.append(self.images.add(kept))
        return segments


@contextmanager
def _left_unwritten() -> Iterator[None]:
    """A context in which torch.empty writes nothing. With deterministic algorithms it would fill every page."""
    settings: Any = torch.utils.deterministic
    before, settings.fill_uninitialized_memory = settings.fill_uninitialized_memory, False
    try:
        yield
    finally:
        settings.fill_uninitialized_memory = before


def _has_windows(text: Any) -> bool:
    """Whether some layers attend to a sliding window.

    Raises:
        ValueError: a layer attends otherwise than to the whole text or to a window, so that it needs other memory.
    """
    if getattr(text, "use_bidirectional_attention", None):
        raise ValueError(
            f"model must attend to earlier tokens alone, got {text.model_type} with use_bidirectional_attention="
            f"{text.use_bidirectional_attention!r}"
        )
    kinds = getattr(text, "layer_types", None)
    for kind in kinds or ():
        if kind not in LAYER_KINDS:
            needs = NEEDS.get(kind, "memory or masks of its own")
            raise ValueError(
                f"model must have only layers of {sorted(LAYER_KINDS)}, got {text.model_type} with {kind!r}, "
                f"which needs {needs}"
            )
    return "sliding_attention" in kinds if kinds else bool(getattr(text, "sliding_window", None))
