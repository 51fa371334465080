"""The next-token loss on the answers, by stage."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, ProcessorMixin

from llava_cot.core import Bos
from llava_cot.data.collate import Batch
from llava_cot.data.conversations import parse_conversation
from llava_cot.data.encode import encode
from llava_cot.data.example import Example
from llava_cot.stages import STAGES
from llava_cot.train.objectives.objective import Losses


class Sft:
    """The negative log-likelihood of the supervised tokens, each weighted by its stage."""

    reference = None

    def __init__(self, stage_weights: Mapping[str, float]) -> None:
        self.names = (*(f"loss/{stage}" for stage in STAGES), "loss/outside")
        # The last entry is for stage -1.
        self._weights = torch.tensor([stage_weights.get(stage, 1.0) for stage in STAGES] + [1.0])

    def encode(self, row: Mapping[str, Any], processor: ProcessorMixin, images: Path, bos: Bos) -> list[Example]:
        """Return the example of a row in LLaVA-CoT-100k's layout."""
        return [encode(parse_conversation(row), processor, bos=bos, image_folder=images)]

    def weight(self, batch: Batch) -> float:
        return float(self._token_weights(batch).sum())

    def __call__(self, model: PreTrainedModel, batch: Batch) -> Losses:
        hidden = model.model(**batch.inputs, use_cache=False).last_hidden_state
        losses = -model.lm_head(hidden.flatten(0, 1), batch.targets.flatten())
        total = (losses * self._token_weights(batch).flatten()).sum()
        known = batch.targets.flatten() >= 0
        places = batch.stages.flatten()[known] % len(self.names)
        parts = torch.zeros(len(self.names), 2, device=losses.device)
        parts.index_add_(0, places, torch.stack([losses.detach()[known], torch.ones_like(losses[known])], 1))
        return Losses(total, parts)

    def _token_weights(self, batch: Batch) -> torch.Tensor:
        weights = self._weights.to(batch.stages.device)[batch.stages]
        return torch.where(batch.targets >= 0, weights, 0)
