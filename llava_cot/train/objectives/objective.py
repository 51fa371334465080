"""The interface of an objective."""

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
    """The losses of one micro-batch, as sums that add up over micro-batches and ranks."""

    total: torch.Tensor  # float32 scalar, the sum of weighted losses; carries the gradient
    parts: torch.Tensor  # float32 [len(names), 2]: for each name the sum and the number of its values


class Objective(Protocol):
    @property
    def names(self) -> tuple[str, ...]:
        """The names of values that are reported beside the loss, each with a slash."""
        ...

    @property
    def reference(self) -> Reference | None:
        """The function that gives the value of each example by the model before training, float32 [examples].

        None means that no reference is needed.
        """
        ...

    def encode(self, row: Mapping[str, Any], processor: ProcessorMixin, images: Path, bos: Bos) -> list[Example]:
        """Return the examples of a row of the data, whose images are in this folder. They stay in one micro-batch.

        Raises:
            ValueError: the row lacks what this objective learns from.
        """
        ...

    def weight(self, batch: Batch) -> float:
        """Return the weight of this micro-batch. The sum of losses of a step is divided by the sum of weights."""
        ...

    def __call__(self, model: PreTrainedModel, batch: Batch) -> Losses: ...


class Step(nn.Module):
    """The root module that FSDP2 sees. A call is a forward pass that returns losses, or values of the reference."""

    def __init__(self, model: PreTrainedModel, objective: Objective) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, batch: Batch, reference: Reference | None = None) -> torch.Tensor | tuple[torch.Tensor, ...]:
        if reference is not None:
            return reference(self.model, batch)
        losses = self.objective(self.model, batch)
        return losses.total, losses.parts  # a tuple, because FSDP2 searches the result for tensors
