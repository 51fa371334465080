"""Collate examples into a batch: pack sequences into rows, put their images side by side, and mask the padding.

Packing needs no attention mask: transformers recognises a new sequence where ``position_ids`` start over. It does so
only without a cache, so the model is called with ``use_cache=False``.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, ProcessorMixin

from llava_cot.data.example import IGNORE_INDEX, Example
from llava_cot.families import training_of
from llava_cot.image import open_image


@dataclass(frozen=True)
class Batch:
    """Rows of tokens and the token that each must predict."""

    inputs: dict[str, Tensor]  # keyword arguments of the model, once its family's ``prepare`` has seen it
    targets: Tensor  # int64 [batch, tokens]: the label of the next token of the same sequence, else IGNORE_INDEX
    stages: Tensor  # int64 [batch, tokens]: the stage of that token, -1 if none
    ends: Tensor  # int64 [examples]: the index of each one's last token in batch * tokens
    values: list[float]  # one per example, NaN if it has none; not a tensor, which FSDP2 would round to bfloat16
    num_tokens: int  # targets that are not IGNORE_INDEX
    num_padding: int  # tokens that belong to no sequence
    num_pairs: int  # the sum of the squared lengths of the examples

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        inputs = {name: function(tensor) for name, tensor in self.inputs.items()}
        tensors: dict[str, Any] = {name: function(getattr(self, name)) for name in ("targets", "stages", "ends")}
        return replace(self, inputs=inputs, **tensors)


class Collator:
    """Makes a batch from rows of examples, with a processor and the config of its model.

    The model gives for each example what unmodified transformers gives for it alone.
    """

    def __init__(self, processor: ProcessorMixin, config: PreTrainedConfig, *, pad_to_multiple_of: int = 1) -> None:
        if pad_to_multiple_of < 1:
            raise ValueError(f"pad_to_multiple_of must be >= 1, got {pad_to_multiple_of}")
        self.processor = processor
        self.training = training_of(config)
        self.pad_to_multiple_of = pad_to_multiple_of

    def __call__(self, rows: Sequence[Sequence[Example]]) -> Batch:
        """Make a batch of ``rows``. A row is a list of examples that follow one another; an empty row is padding.

        A batch without any image gets a dummy image that no token sees, so that all ranks run the same modules.

        Raises:
            ValueError: an image cannot be read, or an example does not have the image tokens of its images.
        """
        if not rows:
            raise ValueError("rows must be at least one, got none")
        lengths = [sum(len(example.input_ids) for example in row) for row in rows]
        images = self._load({path for row in rows for example in row for path in example.images})
        multiple = self.pad_to_multiple_of
        needed = max(lengths) + (0 if images else self.training.dummy_tokens)
        tokens = max(1, -(-needed // multiple)) * multiple

        input_ids = torch.full((len(rows), tokens), self.processor.tokenizer.pad_token_id or 0)
        position_ids = torch.zeros_like(input_ids)  # each padding token is a sequence of its own
        targets = torch.full_like(input_ids, IGNORE_INDEX)
        stages = torch.full_like(input_ids, -1)
        ends = []
        for index, row in enumerate(rows):
            start = 0
            for example in row:
                end = start + len(example.input_ids)
                input_ids[index, start:end] = torch.tensor(example.input_ids)
                position_ids[index, start:end] = torch.arange(end - start)
                targets[index, start : end - 1] = torch.tensor(example.labels[1:])
                stages[index, start : end - 1] = torch.tensor(example.stages[1:])
                ends.append(index * tokens + end - 1)
                start = end
        values = [math.nan if example.value is None else example.value for row in rows for example in row]
        text = {"input_ids": input_ids, "position_ids": position_ids}
        inputs = self.training.pack(self.processor, rows, images, text)
        num_tokens = int((targets != IGNORE_INDEX).sum())
        return Batch(
            inputs,
            targets,
            stages,
            torch.tensor(ends, dtype=torch.int64),
            values,
            num_tokens=num_tokens,
            num_padding=len(rows) * tokens - sum(lengths),
            num_pairs=sum(len(example.input_ids) ** 2 for row in rows for example in row),
        )

    def _load(self, paths: set[str]) -> dict[str, Any]:
        images = {}
        for path in sorted(paths):
            try:
                images[path] = self.training.read_image(self.processor, open_image(path))
            except Exception as error:  # a decoder may raise anything on a broken file
                raise ValueError(f"image {path!r} must be readable: {error}") from error
        return images
