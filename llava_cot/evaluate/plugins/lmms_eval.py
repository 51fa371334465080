"""A model for lmms-eval: ``lmms-eval --model llava_cot --model_args pretrained=...,search=swires --tasks mmstar``."""

import os
from collections.abc import Sequence
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms

from llava_cot.answer import Answer
from llava_cot.generator import SwiresGenerator
from llava_cot.search import settings_of

AT_A_TIME = 256  # questions whose images are held at once; the engine admits as many of them as fit


class LlavaCot(lmms):
    """Answers by search and returns the conclusion alone, since lmms-eval scores everything that a model returns.

    A text in which no stage was opened is its own conclusion, as in ``llava-cot evaluate``.

    What a task says about generation, such as 16 new tokens and a temperature of 0, is not used: it would cut an answer
    in stages before its conclusion. ``model_args`` say it instead.

    Args:
        pretrained: a model folder, a hub name or "tiny".
        search: a name of ``llava_cot.search.POLICIES`` or a preset such as "swires:published".
        seed: of every question's search.
        dtype, device, quantize, grammar: see ``SwiresGenerator.from_pretrained``. By default the device is the GPU of
            LOCAL_RANK, if there is one.
        batch_size, max_batch_size: ignored, for the engine batches what fits.
        settings: settings of the search, such as ``scorer=confidence`` and ``max_new_tokens=512``.

    Raises:
        ValueError: naming the argument that is wrong. The search is checked before the weights are loaded.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str = "Xkev/Llama-3.2V-11B-cot",
        search: str = "swires",
        seed: int = 0,
        dtype: str = "auto",
        device: str | None = None,
        quantize: str | None = None,
        grammar: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        known = settings_of(search)
        for name in settings:
            if name not in known:
                raise ValueError(f"model_args must be settings of search={search!r}, {known}, got {name!r}")
        if device is None and torch.cuda.is_available():
            device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        self.generator = SwiresGenerator.from_pretrained(
            pretrained, dtype=dtype, device=device, quantize=quantize, grammar=grammar
        )
        self.device = self.generator.model.device
        self.search, self.seed, self.settings = search, seed, settings
        self.generator.plan(search, **settings)  # raises if a setting is wrong

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Answer all ``requests``; a search that fails raises, since an empty answer would count as wrong."""
        results = []
        for first in range(0, len(requests), AT_A_TIME):
            batch = [request.args for request in requests[first : first + AT_A_TIME]]
            asked = [self._question(*args[1:]) for args in batch]
            answers = self.generator.answer_batch(
                [images for images, _ in asked],
                [question for _, question in asked],
                self.search,
                seed=self.seed,
                **self.settings,
            )
            for args, answer in zip(batch, answers):
                conclusion = answer.grammar.conclusion_of(answer.text, answer.stages).text
                self.cache_hook.add_partial("generate_until", (args[0], args[2]), conclusion)
                results.append(GenerationResult(conclusion, self._token_counts(answer, conclusion)))
        return results

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Not supported, for the likelihood of an option says nothing about an answer in stages."""
        raise NotImplementedError("llava_cot answers by search and has no log-likelihoods: choose generate_until tasks")

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Not supported."""
        raise NotImplementedError("llava_cot answers one question at a time: choose tasks of one round")

    def _question(self, doc_to_messages: Any, _: Any, doc_id: Any, task: str, split: str) -> tuple[list[Any], Any]:
        """Return the images of a request, and its chat in the form of ``llava_cot.prompt.Question``."""
        images, chat = [], []
        for message in doc_to_messages(self.task_dict[task][split][doc_id]):
            parts = []
            for part in message["content"]:
                if part["type"] == "text":
                    parts.append({"type": "text", "text": part["text"]})
                elif part["type"] == "image":
                    images.append(part["url"])
                    parts.append({"type": "image"})
                else:
                    raise ValueError(f"task {task!r} must have images and text only, got {part['type']!r}")
            chat.append({"role": message["role"], "content": parts})
        return images, chat

    def _token_counts(self, answer: Answer, conclusion: str) -> TokenCounts:
        """Count what the whole search drew, since that is what the answer cost; reasoning is all but the conclusion."""
        drawn = answer.usage.generated_tokens
        told = len(self.generator.processor.tokenizer(conclusion, add_special_tokens=False)["input_ids"])
        return TokenCounts(answer.usage.prompt_tokens, drawn, max(0, drawn - told))
