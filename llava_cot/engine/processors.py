"""The logits processors of a model's generation config: penalties, minimum lengths, suppressed and biased tokens."""

import copy
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import GenerationConfig, LogitsProcessorList

from llava_cot.engine.generation_config import refuse


class LogitsProcessors:
    """Applies what transformers builds from ``model.generation_config``, to each row with its own tokens.

    ``is_empty`` says that there is nothing to apply. Sampling filters are not among them: those are the search's own.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._given: dict[str, Any] | None = None
        self._config: GenerationConfig
        self._by_length: dict[int, LogitsProcessorList] = {}
        self.is_empty = True

    def follow(self, eos_token_ids: frozenset[int], device: torch.device) -> None:
        """Read the generation config again.

        Raises:
            ValueError: one of its fields can't be followed, or has a wrong value.
        """
        config = self._model.generation_config
        given = {**config.to_dict(), "eos_token_id": eos_token_ids}
        if given == self._given:
            return
        refuse(config, "generation_config.")
        self._config = copy.deepcopy(config)
        self._config.do_sample = False  # or the filters of sampling would be built too
        ids = sorted(eos_token_ids)
        self._config._eos_token_tensor = torch.tensor(ids, device=device) if ids else None
        self._by_length = {}
        self.is_empty = not self._of(1, device)
        self._given = given

    def apply(
        self, logits: torch.Tensor, rows: Sequence[int], prompts: Sequence[torch.Tensor], paths: Sequence[Sequence[int]]
    ) -> torch.Tensor:
        """Return float32 [N, V]: for each of N texts its row of ``logits`` [R, V], processed.

        A text is one of ``prompts``, int64 [1, T], and then the token ids of one of ``paths``.
        """
        scores, alike = logits[list(rows)].float(), defaultdict[tuple[int, int], list[int]](list)
        # The image token of Mllama has no logit. The processors of older transformers look for it all the same.
        beyond = max(0, self._model.config.image_token_id + 1 - scores.shape[1])
        scores = pad(scores, (0, beyond), value=-math.inf)
        for at, (prompt, path) in enumerate(zip(prompts, paths, strict=True)):
            alike[prompt.shape[1], len(path)].append(at)
        for (length, _), places in alike.items():
            ids = [[*prompts[at][0].tolist(), *paths[at]] for at in places]
            processors = self._of(length, logits.device)
            scores[places] = processors(torch.tensor(ids, device=logits.device), scores[places])
        return scores[:, : logits.shape[1]]

    def _of(self, prompt_length: int, device: torch.device) -> LogitsProcessorList:
        if prompt_length not in self._by_length:
            self._by_length[prompt_length] = self._model._get_logits_processor(
                self._config, input_ids_seq_length=prompt_length, device=device
            )
        return self._by_length[prompt_length]
