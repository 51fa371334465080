"""Ways to draw the candidates of a loop, in the strongest forms that transformers has.

- ``ReturnedWay``: all candidates of a parent are one call from pixels, with ``num_return_sequences``.
- ``StaticReturnedWay``: the same, with ``cache_implementation="static"``, which Mllama has from transformers 5.24 on.
- ``StaticCachedWay``: the cached loop, with a static cache that is copied from the prompt's.
- ``StaticWay``: the cached loop without ``generate``, on ``StaticDecoder``.

With a static cache transformers compiles the decode steps on a GPU by itself. On a CPU it does so where ``compile`` is
set. Then all calls must use caches of one length, or each length would be compiled: ``max_new_tokens`` is what the
longest answer has.
"""

from collections.abc import Sequence
from typing import Any

import transformers
from helpers.reference_loop import CachedWay, Counts, PublishedWay, Text
from static_decode import StaticDecoder, prefill
from transformers import CompileConfig, StaticCache
from transformers.cache_utils import StaticLayer
from transformers.generation import GenerationMixin

# The seeded sampler leaves one token possible, so whatever ``generate`` draws is that one.
SAMPLING = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0}


class Unavailable(Exception):
    """The installed transformers does not have what a way needs."""


class ReturnedWay(PublishedWay):
    """The candidates of a parent are the returned sequences of one call, from pixels."""

    def __init__(self, model: Any, tokenizer: Any, inputs: Any, backend: str, **settings: Any):
        super().__init__(model, tokenizer, inputs, backend)
        self.settings = settings

    def draw(self, prefix: Sequence[int], seeds: Sequence[int], params: Any, limit: int) -> list[Text]:
        settings = {**SAMPLING, "num_return_sequences": len(seeds), **self.settings}
        return self._generate(prefix, seeds, params, limit, True, {}, **settings)


class StaticReturnedWay(ReturnedWay):
    """``ReturnedWay`` with a static cache."""

    def __init__(
        self, model: Any, tokenizer: Any, inputs: Any, backend: str, *, max_new_tokens: int, compile: bool = False
    ):
        if type(model)._prepare_static_cache is GenerationMixin._prepare_static_cache:
            raise Unavailable(f"transformers {transformers.__version__} has no static cache for Mllama; 5.24 has one")
        length = inputs["input_ids"].shape[1] + max_new_tokens
        static = {"cache_implementation": "static", "max_cache_len": length, **compile_settings(compile)}
        super().__init__(model, tokenizer, inputs, backend, **static)


class StaticCachedWay(CachedWay):
    """``CachedWay`` with a static cache: no image is encoded again, and no tensor of the cache grows."""

    def __init__(
        self, model: Any, tokenizer: Any, inputs: Any, backend: str, *, max_new_tokens: int, compile: bool = False
    ):
        super().__init__(model, tokenizer, inputs, backend)
        self.length, self.settings = self.prompt.shape[1] + max_new_tokens, compile_settings(compile)

    def draw(self, prefix: Sequence[int], seeds: Sequence[int], params: Any, limit: int) -> list[Text]:
        self.counts.prefilled += (len(prefix) + 1) * len(seeds)
        given = {"past_key_values": self._open(len(seeds))}
        return self._generate(prefix, seeds, params, limit, True, given, **self.settings)

    def _open(self, n: int) -> StaticCache:
        """Return a cache of ``n`` rows that begins with the prompt."""
        text = self.model.config.get_text_config()
        cache = StaticCache(config=text, max_cache_len=self.length)
        for index, known in enumerate(self.cache.layers):
            if index in text.cross_attention_layers:
                cache.layers[index] = StaticLayer(max_cache_len=known.keys.shape[2])
            cache.layers[index].update(*(tensor.expand(n, -1, -1, -1) for tensor in (known.keys, known.values)))
        return cache


class StaticWay:
    """``CachedWay`` on ``StaticDecoder`` objects, one per number of candidates. All questions share them."""

    def __init__(self, model, tokenizer, inputs, backend, *, decoders: dict[int, StaticDecoder], **settings):
        self.model, self.decoders, self.settings = model, decoders, settings
        self.prompt = prefill(model, inputs)
        for decoder in decoders.values():
            decoder.load(self.prompt)
        self.counts = Counts(prefilled=self.prompt.length - 1, image_encodings=1)

    def draw(self, prefix, seeds, params, limit):
        n = len(seeds)
        if n not in self.decoders:
            sampling = {"temperature": params.temperature, "top_p": params.top_p}
            self.decoders[n] = StaticDecoder(self.model, self.prompt, n, **sampling, **self.settings)
        self.counts.prefilled += len(prefix)
        self.counts.decoded += n * limit
        nothing = [0.0] * limit
        return [Text(tokens, nothing, nothing, None, False) for tokens in self.decoders[n].run(limit, prefix).tolist()]


def compile_settings(compile: bool) -> dict[str, Any]:
    """Return what makes ``generate`` compile decode steps on a CPU too, as it does on a GPU anyway."""
    if not compile:
        return {}
    config = CompileConfig()
    config._compile_all_devices = True
    return {"compile_config": config}
