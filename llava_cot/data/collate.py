"""Collate examples into a batch: pack sequences into rows, put their images side by side, and mask the padding.

Packing needs no attention mask: transformers recognises a new sequence where ``position_ids`` start over. It does so
only without a cache, so the model is called with ``use_cache=False``.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.models.mllama.processing_mllama import get_cross_attention_token_mask

from llava_cot.data.example import IGNORE_INDEX, Example
from llava_cot.prompt import open_image


@dataclass(frozen=True)
class Batch:
    """Rows of tokens and the token that each must predict."""

    inputs: dict[str, Tensor]  # keyword arguments of MllamaModel, and cross_rows for install_cross_rows
    targets: Tensor  # int64 [batch, tokens]: the label of the next token of the same sequence, else IGNORE_INDEX
    stages: Tensor  # int64 [batch, tokens]: the stage of that token, -1 if none
    ends: Tensor  # int64 [examples]: the index of each one's last token in batch * tokens
    values: list[float]  # one per example, NaN if it has none; not a tensor, which FSDP2 would round to bfloat16
    num_tokens: int  # targets that are not IGNORE_INDEX
    num_padding: int  # tokens that belong to no sequence

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        return self._map(Tensor.pin_memory)

    def _map(self, function) -> "Batch":
        inputs = {name: function(tensor) for name, tensor in self.inputs.items()}
        tensors = {name: function(getattr(self, name)) for name in ("targets", "stages", "ends")}
        return replace(self, inputs=inputs, **tensors)


@dataclass(frozen=True)
class Image:
    pixels: Tensor  # float32 [max_tiles, 3, height, width]
    tiles: int
    aspect_ratio_id: int


class Collator:
    """Makes a batch from rows of examples, with the processor of an Mllama.

    With ``install_cross_rows`` the model gives for each example what unmodified transformers gives for it alone. There
    a token before the images of its sequence sees all their tiles; here it sees those of its own sequence. A sequence
    without an image passes through the cross-attention layers unchanged.
    """

    def __init__(self, processor, *, pad_to_multiple_of: int = 1):
        if pad_to_multiple_of < 1:
            raise ValueError(f"pad_to_multiple_of must be >= 1, got {pad_to_multiple_of}")
        self.processor = processor
        self.max_tiles: int = processor.image_processor.max_image_tiles
        self.pad_to_multiple_of = pad_to_multiple_of

    def __call__(self, rows: Sequence[Sequence[Example]]) -> Batch:
        """Make a batch of ``rows``. A row is a list of examples that follow one another; an empty row is padding.

        A batch without any image gets a dummy image that no token sees, so that all ranks run the same modules.

        Raises:
            ValueError: an image cannot be read, or an example does not have one image token for each of its images.
        """
        if not rows:
            raise ValueError("rows must be at least one, got none")
        lengths = [sum(len(example.input_ids) for example in row) for row in rows]
        multiple = self.pad_to_multiple_of
        tokens = max(1, -(-max(lengths) // multiple)) * multiple
        layouts = [_lay_out(row) for row in rows]
        images = self._load({path for places in layouts for path, _ in places})
        slots = max(1, *map(len, layouts))

        input_ids = torch.full((len(rows), tokens), self.processor.tokenizer.pad_token_id or 0)
        position_ids = torch.zeros_like(input_ids)  # each padding token is a sequence of its own
        targets = torch.full_like(input_ids, IGNORE_INDEX)
        stages = torch.full_like(input_ids, -1)
        # uint8, because transformers repeats it for every image token in its own dtype.
        cross_mask = torch.zeros(len(rows), tokens, slots, self.max_tiles, dtype=torch.uint8)
        cross_rows = torch.zeros(len(rows), tokens, 2)
        ends = []
        for index, (row, places) in enumerate(zip(rows, layouts)):
            start = 0
            for example in row:
                end = start + len(example.input_ids)
                input_ids[index, start:end] = torch.tensor(example.input_ids)
                position_ids[index, start:end] = torch.arange(end - start)
                targets[index, start : end - 1] = torch.tensor(example.labels[1:])
                stages[index, start : end - 1] = torch.tensor(example.stages[1:])
                self._look(example, places, images, cross_mask[index, start:end], cross_rows[index, start:end])
                ends.append(index * tokens + end - 1)
                start = end
        values = [math.nan if example.value is None else example.value for row in rows for example in row]
        inputs = {
            "input_ids": input_ids,
            "position_ids": position_ids,
            **self._place(layouts, images, slots),
            "cross_attention_mask": cross_mask,
            "cross_rows": cross_rows,
        }
        num_tokens = int((targets != IGNORE_INDEX).sum())
        return Batch(
            inputs,
            targets,
            stages,
            torch.tensor(ends, dtype=torch.int64),
            values,
            num_tokens=num_tokens,
            num_padding=len(rows) * tokens - sum(lengths),
        )

    def _look(
        self, example: Example, places: dict[Any, int], images: dict[str, Image], mask: Tensor, rows: Tensor
    ) -> None:
        """Fill in what the tokens of one example see: ``mask`` [tokens, images, tiles] and ``rows`` [tokens, 2]."""
        spans = get_cross_attention_token_mask(example.input_ids, self.processor.image_token_id)
        if len(spans) != len(example.images):
            raise ValueError(
                f"input_ids must have an image token for each of images={example.images}, got {len(spans)} image tokens"
            )
        if not example.images:
            return
        own = [places[key] for key in _numbered(example.images)]
        for (first, last), path, slot in zip(spans, example.images, own):
            mask[first : None if last == -1 else last, slot, : images[path].tiles] = 1
        sees = mask.flatten(1).any(1).bool()  # any() of uint8 is uint8
        rows[:, 0] = 1
        rows[:, 1] = sees
        for slot in own:
            mask[~sees, slot] = 1  # padding tiles too, as in transformers

    def _place(self, layouts: list[dict[Any, int]], images: dict[str, Image], slots: int) -> dict[str, Tensor]:
        """Return the vision inputs. Missing images are zeros with aspect ratio id 0, as the processor pads."""
        size = self.processor.image_processor.size
        pixels = torch.zeros(len(layouts), slots, self.max_tiles, 3, size["height"], size["width"])
        ids = torch.zeros(len(layouts), slots, dtype=torch.int64)
        mask = torch.zeros(len(layouts), slots, self.max_tiles, dtype=torch.int64)
        mask[..., 0] = 1
        if not images:
            ids[0, 0] = 1  # the dummy
        for index, places in enumerate(layouts):
            for (path, _), slot in places.items():
                image = images[path]
                pixels[index, slot] = image.pixels
                ids[index, slot] = image.aspect_ratio_id
                mask[index, slot, : image.tiles] = 1
        return {"pixel_values": pixels, "aspect_ratio_ids": ids, "aspect_ratio_mask": mask}

    def _load(self, paths: set[str]) -> dict[str, Image]:
        images = {}
        for path in sorted(paths):
            try:
                made = self.processor.image_processor(images=[[open_image(path)]], return_tensors="pt")
            except Exception as error:  # a decoder may raise anything on a broken file
                raise ValueError(f"image {path!r} must be readable: {error}") from error
            tiles = int(np.asarray(made["num_tiles"]).item())
            images[path] = Image(made["pixel_values"][0, 0], tiles, int(made["aspect_ratio_ids"].item()))
        return images


def _numbered(paths: Sequence[str]) -> list[tuple[str, int]]:
    """Pair each path with how often it came before, since an example that shows an image twice attends to two."""
    return [(path, paths[:at].count(path)) for at, path in enumerate(paths)]


def _lay_out(row: Sequence[Example]) -> dict[Any, int]:
    """Return the slots of a row's images. A file that several of its examples show has one slot."""
    places: dict[Any, int] = {}
    for example in row:
        for key in _numbered(example.images):
            places.setdefault(key, len(places))
    return places
