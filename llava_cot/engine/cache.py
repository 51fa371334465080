"""The paged cache as transformers sees it: a ``Cache`` of one forward pass, over pages and images that outlive it."""

import torch
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from llava_cot.engine.alias import alias
from llava_cot.engine.batch import Batch
from llava_cot.engine.images import ImageStore
from llava_cot_kernels.paged_kv import store_kv


class _Layer(CacheLayerMixin):
    """What a cache layer of a single forward pass need not do.

    In a prefill, ``keys`` and ``values`` [rows, Hkv, T, D] are what the model gave to the cache.
    """

    is_sliding = False
    is_compileable = False
    keys: torch.Tensor | None
    values: torch.Tensor | None

    def check_unchanged(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Check that a layer attends to what it gave to the cache, since decoding reads only that.

        Raises:
            ValueError: it does not.
        """
        if key is not self.keys or value is not self.values:
            raise ValueError("model must attend to the keys and values that it caches, but a layer changes them after")

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.is_initialized = True

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_max_cache_shape(self) -> int:
        return -1

    def get_max_length(self) -> int:
        return -1

    def prepare_to_compile(self) -> None:
        """Let what is compiled next depend on the sizes of this layer's memory, which never change."""
        raise NotImplementedError


class PagedLayer(_Layer):
    """Self-attention: new keys and values go to their slots, the attention function reads the pages."""

    def __init__(self, kv_cache: torch.Tensor, batch: Batch) -> None:
        super().__init__()
        self.key_cache, self.value_cache = kv_cache  # [num_pages + 1, page_size, Hkv, D]
        self.batch = batch

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # [rows, Hkv, T, D], a strided view of the projection; of a single row it stays one
        key, value = (states.transpose(1, 2).flatten(0, 1) for states in (key_states, value_states))
        if torch.compiler.is_compiling():  # then it is fused with what computes the keys
            for pages, new in ((self.key_cache, key), (self.value_cache, value)):
                pages.flatten(0, 1).index_put_((self.batch.slot_mapping,), new)
        else:
            store_kv(key, value, self.key_cache, self.value_cache, self.batch.slot_mapping)
        if self.batch.is_prefill:
            self.keys, self.values = key_states, value_states
        return key_states, value_states

    def check_unchanged(self, key: torch.Tensor, value: torch.Tensor) -> None:
        super().check_unchanged(key, value)
        self.keys = self.values = None  # the pages have them, and a pass over long prompts has many layers

    def prepare_to_compile(self) -> None:
        self.key_cache, self.value_cache = map(alias, (self.key_cache, self.value_cache))
        for pages in (self.key_cache, self.value_cache):
            torch._dynamo.mark_static(pages)

    def get_seq_length(self) -> int:
        return 0 if self.batch.is_prefill else 1  # models that are given positions only ask whether there is anything


class ImageLayer(_Layer):
    """Cross-attention: filled by the prefill with every tile, read from the image store afterwards."""

    def __init__(self, key: torch.Tensor | None = None, value: torch.Tensor | None = None) -> None:
        super().__init__()
        self.keys, self.values = key, value
        self.is_initialized = key is not None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.keys, self.values = key_states, value_states  # [rows, Hkv, tiles * patches, D]
        self.is_initialized = True
        return key_states, value_states

    def prepare_to_compile(self) -> None:
        for stored in (self.keys, self.values):
            torch._dynamo.mark_static(stored)

    def get_seq_length(self) -> int:
        return 0 if self.keys is None else self.keys.shape[-2]


class PagedCache(Cache):
    """The cache of one forward pass over ``kv_cache`` [2, num_self_layers, num_pages + 1, page_size, Hkv, D].

    The last page belongs to no sequence. Slot -1 counts from the end, so what is written there by index is lost.
    """

    def __init__(self, kv_cache: torch.Tensor, images: ImageStore, cross_layers: tuple[int, ...], batch: Batch) -> None:
        layers: list[_Layer] = []
        num_cross = 0
        for index in range(kv_cache.shape[1] + len(cross_layers)):
            if index in cross_layers:
                key, value = images.kv[:, num_cross].transpose(1, 2).unsqueeze(1)  # [1, Hkv, capacity, D]
                layers.append(ImageLayer() if batch.is_prefill else ImageLayer(key, value))
                num_cross += 1
            else:
                layers.append(PagedLayer(kv_cache[:, index - num_cross], batch))
        super().__init__(layers=layers)
        self.batch = batch
