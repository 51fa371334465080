"""What the trainer asks of an objective."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel, ProcessorMixin

from llava_cot.core import Bos
from llava_cot.data.collate import Batch
from llava_cot.data.example import Example

Reference = Callable[[PreTrainedModel, Batch], torch.Tensor]


@dataclass(frozen=True)
class Losses:
    """Of one micro-batch: sums, so that they add up over micro-batches and ranks, whatever each holds."""

    total: torch.Tensor  # float32 scalar, the sum of weighted losses; carries the gradient
    parts: torch.Tensor  # float32 [len(names), 2]: for each name the sum of its values, and how many there were


class Objective(Protocol):
    @property
    def names(self) -> tuple[str, ...]:
        """Of what is reported beside the loss, each with a slash."""
        ...

    @property
    def reference(self) -> Reference | None:
        """What the model before training says of each example, float32 [examples], which becomes the example's value.

        None: it is not asked.
        """
        ...

    def encode(self, row: Mapping[str, Any], processor: ProcessorMixin, images: Path, bos: Bos) -> list[Example]:
        """The examples of a row of the data, whose images are in this folder; they stay in one micro-batch.

        Raises:
            ValueError: the row does not have what this objective learns from.
        """
        ...

    def weight(self, batch: Batch) -> float:
        """What this micro-batch adds to the number that the step's sum of losses is divided by."""
        ...

    def __call__(self, model: PreTrainedModel, batch: Batch) -> Losses: ...


class Step(nn.Module):
    """The module whose call is a forward pass and its losses, or its reference: the root that FSDP2 sees."""

    def __init__(self, model: PreTrainedModel, objective: Objective) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, batch: Batch, reference: Reference | None = None) -> torch.Tensor | tuple[torch.Tensor, ...]:
        if reference is not None:
            return reference(self.model, batch)
        losses = self.objective(self.model, batch)
        return losses.total, losses.parts  # a tuple, since FSDP2 looks for tensors in what is returned
