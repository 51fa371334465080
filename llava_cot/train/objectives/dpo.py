"""Direct preference optimisation on pairs of stages (Rafailov et al., 2023, arXiv:2305.18290)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import logsigmoid
from transformers import PreTrainedModel, ProcessorMixin

from llava_cot.core import Bos
from llava_cot.data.collate import Batch
from llava_cot.data.encode import check_counts
from llava_cot.data.example import IGNORE_INDEX, Example
from llava_cot.literal import token_ids
from llava_cot.train.config import Dpo as Settings
from llava_cot.train.objectives.objective import Losses
from llava_cot.train.objectives.rows import image_files


def completion_logprobs(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Return the log-prob of the learnt tokens of each example, float32 [examples], in nats."""
    hidden = model.model(**batch.inputs, use_cache=False).last_hidden_state
    logprobs = model.lm_head(hidden.flatten(0, 1), batch.targets.flatten())
    places, known = _known(batch)
    return logprobs.new_zeros(len(batch.ends)).index_add(0, places, logprobs[known])


def _known(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the example of each learnt token, and the index of the token: int64 [num_tokens] each."""
    known = (batch.targets.flatten() >= 0).nonzero().squeeze(1)
    return torch.bucketize(known, batch.ends), known


class Dpo:
    """The DPO loss ``-log sigmoid(chosen - rejected)``, where each reward is ``beta * log(p / p_reference)``.

    The reference is the model before training. The loss also has ``sft_weight`` times the negative log-likelihood per
    token of the chosen one (Pang et al., 2024, arXiv:2404.19733).
    """

    names = ("preference/accuracy", "preference/margin", "preference/chosen", "preference/rejected")
    reference = staticmethod(completion_logprobs)

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def encode(self, row: Mapping[str, Any], processor: ProcessorMixin, images: Path, bos: Bos) -> list[Example]:
        """Return the chosen and the rejected example of a text row of ``llava-cot export --format preferences``.

        Prompt and completion are tokenized apart, because the model stopped reading and began to draw between them. The
        marks of ``TextForm`` are taken out, so these are the tokens of the search, whatever the question spells.
        """
        for name in ("prompt", "chosen", "rejected"):
            if not isinstance(row.get(name), str) or not row[name]:
                raise ValueError(f"{name} must be text, as TextForm writes it, got {str(row.get(name))[:80]!r}")
        prompt, *completions = (token_ids(row[name], processor.tokenizer) for name in ("prompt", "chosen", "rejected"))
        files = image_files(row, images)
        check_counts("prompt must have", prompt, processor, images=len(files), bos=bos)
        return [
            Example(prompt + ids, [IGNORE_INDEX] * len(prompt) + ids, [-1] * (len(prompt) + len(ids)), files)
            for ids in completions
        ]

    def weight(self, batch: Batch) -> float:
        return len(batch.ends) / 2

    def __call__(self, model: PreTrainedModel, batch: Batch) -> Losses:
        logprobs = completion_logprobs(model, batch)
        reference = torch.tensor(batch.values, device=logprobs.device)
        chosen, rejected = (self._settings.beta * (logprobs - reference)).view(-1, 2).unbind(1)
        margin = chosen - rejected
        losses = -logsigmoid(margin)
        if self._settings.sft_weight:
            lengths = torch.bincount(_known(batch)[0], minlength=len(batch.ends))
            losses = losses - self._settings.sft_weight * (logprobs / lengths)[::2]
        sums = torch.stack([(margin > 0).float(), margin, chosen, rejected]).detach().sum(1)
        return Losses(losses.sum(), torch.stack([sums, torch.full_like(sums, len(margin))], 1))
