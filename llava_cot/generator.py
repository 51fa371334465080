"""The public face: a model, its processor, and every search on them."""

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from types import MappingProxyType, NoneType
from typing import Any, NoReturn

import torch
import transformers
from PIL.Image import Image
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationConfig,
    LogitsProcessor,
    PreTrainedModel,
    ProcessorMixin,
    StoppingCriteria,
)

from llava_cot.bundled import model_path
from llava_cot.chat import turn_tokens
from llava_cot.checkpoint import checkpoint_sha256
from llava_cot.core import Bos, Session, check_kind, whole_number
from llava_cot.custom_generate import SearchOutput, arguments, refuse_own
from llava_cot.detokenise import Detokeniser
from llava_cot.engine.config import EngineConfig
from llava_cot.engine.engine import Engine
from llava_cot.engine.generation_config import SETTINGS
from llava_cot.families import Prompt, family_of
from llava_cot.grammars import WHOLE, grammar_of, named_grammar
from llava_cot.loading import check_device, check_dtype, check_name, source_of
from llava_cot.prompt import build_inputs, check_fits, split_rows
from llava_cot.quantize import check_quantize, loading_settings
from llava_cot.question import Question
from llava_cot.remote import RemoteGenerator, connect
from llava_cot.scoring import Calibration
from llava_cot.scoring.scorer import TurnTokens
from llava_cot.search import Plan, SearchLike, settings_of
from llava_cot.search.run import SearchRun
from llava_cot.search.search import stop_tags
from llava_cot.searcher import Searcher, cancel_all
from llava_cot.stages import Grammar
from llava_cot.vocabulary import Vocabulary

CALIBRATION_FILE = "swires_calibration.json"
GRAMMAR_FILE = "swires_grammar.json"
# The settings of a search that ``generate`` takes with transformers' meaning
DECODING = frozenset({*SETTINGS, "max_new_tokens"})


class SwiresGenerator(Searcher):
    """Stage-level search on an unmodified model of one of ``llava_cot.families.FAMILIES`` and its processor.

    ``model`` and ``processor`` stay plain transformers objects; the weights are shared, nothing is patched. A generator
    may be called from several threads, and while streams are open: all that runs at one time shares forward passes.
    ``aio`` has the same methods for asyncio.

    Args:
        bos: how many BOS tokens a prompt begins with; ``"released"`` is as the released LLaVA-CoT weights were trained.
        system: the system prompt of every question.
        chat_template_kwargs: variables of the chat template, such as ``{"enable_thinking": False}``.
        grammar: the stages that the model writes, or the name of one of ``llava_cot.grammars.GRAMMARS``. By default it
            is the one that the family, the chat template or the tokenizer shows plainly. If none does, a search that
            goes stage by stage asks for it.
        calibrations: quantiles of scores, by scorer, that thresholds are looked up in.
        engine: how the engine stores and computes.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        *,
        bos: Bos = "one",
        grammar: Grammar | str | None = None,
        system: str | None = None,
        chat_template_kwargs: Mapping[str, Any] = MappingProxyType({}),
        calibrations: Sequence[Calibration] = (),
        engine: EngineConfig = EngineConfig(),  # noqa: B008, it is frozen
    ) -> None:
        _require_kind("model", model, torch.nn.Module, "a transformers model")
        _require_kind("processor", processor, ProcessorMixin, "the model's processor")
        check_kind("grammar", grammar, (Grammar, str, NoneType), "a Grammar, the name of one or None")
        check_kind("system", system, (str, NoneType), "a string or None")
        check_kind("chat_template_kwargs", chat_template_kwargs, Mapping, "a mapping")
        for name in ("tokenize", "add_generation_prompt"):
            if name in chat_template_kwargs:
                raise ValueError(f"chat_template_kwargs must not set {name}, got {chat_template_kwargs[name]!r}")
        check_kind("engine", engine, EngineConfig, "an EngineConfig")
        check_kind("calibrations", calibrations, (list, tuple), "a list of Calibrations")
        for calibration in calibrations:
            check_kind("calibrations", calibration, Calibration, "a list of Calibrations")
        if bos not in ("one", "released"):
            raise ValueError(f"bos must be 'one' or 'released', got {bos!r}")
        self.model, self.processor, self.bos = model, processor, bos
        self.system, self.chat_template_kwargs = system, dict(chat_template_kwargs)
        self.calibrations = {calibration.scorer: calibration for calibration in calibrations}
        if isinstance(grammar, str):
            grammar = named_grammar(grammar)
        known = grammar or family_of(model.config).grammar or grammar_of(processor)
        self.knows_grammar = known is not None
        self.grammar = known or WHOLE
        self.vocabulary = Vocabulary(processor.tokenizer, self.grammar.all_tags)
        tags = self.vocabulary.stop_tags(stop_tags(self.grammar))
        self.engine = Engine(model, tags, self.decode, engine)
        self._processing = threading.Lock()  # tokenizers may not be used by two threads at once

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a SwiresGenerator can't be pickled, since it holds a running engine: make one in each process, with "
            "SwiresGenerator.from_pretrained(...). Answers and traces can be pickled"
        )

    @classmethod
    def connect(cls, base_url: str, **settings: Any) -> "RemoteGenerator":
        """See ``llava_cot.connect``: the same searches on a model that a server runs."""
        return connect(base_url, **settings)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device | None = None,
        quantize: str | None = None,
        bos: Bos = "one",
        grammar: Grammar | str | None = None,
        system: str | None = None,
        chat_template_kwargs: Mapping[str, Any] = MappingProxyType({}),
        engine: EngineConfig = EngineConfig(),  # noqa: B008, it is frozen
        **kwargs: Any,
    ) -> "SwiresGenerator":
        """Load a model folder, a hub name or a bundled scale model: ``"tiny"`` or ``"tiny-qwen"``.

        ``kwargs`` go to transformers.

        Those that say where files come from, such as ``revision``, ``subfolder`` and ``token``, are the processor's
        too. A ``swires_calibration.json`` in a local folder is loaded with it, and so is a ``swires_grammar.json``, the
        JSON of ``Grammar.to_dict()``, unless a grammar is named. ``quantize`` is ``"int8"``, ``"int4"``, ``"float8"``
        or ``"nf4"``, and quantises the decoder's weights as they are loaded. transformers' own ``quantization_config``
        may be given instead.

        Raises:
            ValueError, TypeError: naming the argument that is wrong, before the weights are loaded.
        """
        check_name(name)
        check_dtype(dtype)
        if isinstance(grammar, str):
            grammar = named_grammar(grammar)
        if device is not None:
            check_device(device)
        path = model_path(name)
        settings = {"dtype": dtype, **kwargs}
        if quantize is not None:
            check_quantize(quantize, dtype, device)
            for other in ("quantization_config", "device_map"):
                if kwargs.get(other) is not None:
                    raise ValueError(f"{other} must not be given with quantize, got quantize={quantize!r}")
            config = kwargs.get("config") or AutoConfig.from_pretrained(path, **source_of(kwargs))
            settings |= loading_settings(quantize, config, dtype, device)
        elif kwargs.get("quantization_config") is not None and device is not None:
            settings.setdefault("device_map", {"": device})  # some can't be moved from where they were quantised
        model = AutoModelForImageTextToText.from_pretrained(path, **settings)
        if device is not None and settings.get("quantization_config") is None:
            model = model.to(device)
        processor = AutoProcessor.from_pretrained(path, **source_of(kwargs))
        folder = Path(path) / kwargs.get("subfolder", "")
        file = folder / CALIBRATION_FILE
        calibrations = Calibration.load_all(file) if file.is_file() else []
        sha256 = checkpoint_sha256(folder)
        for calibration in calibrations:
            if calibration.model not in (None, sha256):
                raise ValueError(f"{file} must be of the weights beside it, {sha256}, got one of {calibration.model}")
        file = folder / GRAMMAR_FILE
        if grammar is None and file.is_file():
            grammar = Grammar(**json.loads(file.read_text(encoding="utf-8")))
        return cls(
            model,
            processor,
            bos=bos,
            grammar=grammar,
            system=system,
            chat_template_kwargs=chat_template_kwargs,
            calibrations=calibrations,
            engine=engine,
        )

    def generate(
        self,
        input_ids: torch.Tensor | None = None,
        *,
        search: SearchLike = "swires",
        seed: int | None = None,
        do_sample: bool | None = None,
        max_length: int | None = None,
        pad_token_id: int | None = None,
        return_dict_in_generate: bool = False,
        **kwargs: Any,
    ) -> torch.Tensor | SearchOutput:
        """Where ``model.generate(**inputs)`` stood: prompts and their continuations, right-padded, int64 [B, T + new].

        Model inputs and decoding arguments keep transformers' names and meaning (``max_new_tokens``, ``temperature``,
        ``top_k``, ``top_p``, ``min_p``, ``num_return_sequences``); other fields of the search's configuration may be
        given too. What is not supported raises by name. Without ``seed`` one is drawn from torch's global generator, so
        that ``torch.manual_seed`` makes a run repeatable. A search that returns several sequences has the best first,
        and fewer than ``num_return_sequences`` where it found fewer that differ. Where the grammar has turns of the
        user, the continuations have their tokens too; that of the first stage must be in the prompt.
        """
        names = family_of(self.model.config).inputs
        inputs = {name: kwargs.pop(name) for name in names if name in kwargs}
        rows = split_rows({"input_ids": input_ids, **inputs}, self.model.config)  # type: ignore[dict-item]
        assert input_ids is not None
        size = self.model.get_input_embeddings().weight.shape[0]
        for row in rows:
            if not 0 <= row["input_ids"].min() <= row["input_ids"].max() < size:
                raise ValueError(f"input_ids must be in [0, {size}), got {row['input_ids'][0].tolist()}")
        # None is as if it had not been given, as in transformers.
        kwargs = {name: value for name, value in kwargs.items() if value is not None or name not in DECODING}
        check_kind("pad_token_id", pad_token_id, (Integral, NoneType), "int or None")
        if max_length is not None:
            num_tokens = input_ids.shape[1]
            if whole_number("max_length", max_length, 1) <= num_tokens and "max_new_tokens" not in kwargs:
                raise ValueError(f"max_length must be > {num_tokens}, the tokens of the prompt, got {max_length}")
            kwargs.setdefault("max_new_tokens", int(max_length) - num_tokens)
        plan = self.plan(search, **kwargs)
        if do_sample is not None and do_sample != plan.config.samples:
            raise ValueError(f"do_sample must be {plan.config.samples} with search={plan.name!r}, got {do_sample}")
        if seed is None:
            seed = int(torch.randint(2**62, ()))
        runs: list[SearchRun] = []
        try:
            for row in rows:
                runs.append(self.start(row, plan, seed))
            self.wait(runs)
            found = [(index, run, node) for index, run in enumerate(runs) for node in self._nodes(run)]
        finally:
            cancel_all(runs)
        # Without a pad token EOS pads, as in transformers; rows of one length need neither.
        pads = (pad_token_id, self.model.generation_config.pad_token_id, *self.engine.eos_token_ids)
        pad = next((token for token in pads if token is not None), None)
        paths = [list(node.read_tokens()) for _, _, node in found]
        longest = max(map(len, paths))
        padded = torch.tensor([path + [pad] * (longest - len(path)) for path in paths], device=input_ids.device)
        sequences = torch.cat([input_ids[[index for index, _, _ in found]], padded], dim=1)
        if not return_dict_in_generate:
            return sequences
        answers = tuple(self.answer_of(run, node) for _, run, node in found)
        scores = [node.score for _, _, node in found]
        scored = None if None in scores else torch.tensor(scores, dtype=torch.float32, device=sequences.device)
        return SearchOutput(sequences=sequences, sequences_scores=scored, answers=answers)

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        logits_processor: Sequence[LogitsProcessor] = (),
        stopping_criteria: Sequence[StoppingCriteria] = (),
        generation_config: GenerationConfig | None = None,
        *,
        search: SearchLike = "swires",
        seed: int | None = None,
        settings: Mapping[str, object] | None = None,
        **kwargs: Any,
    ) -> torch.Tensor | SearchOutput:
        """``model.generate(**inputs, custom_generate=generator, search=..., seed=..., settings={...})``.

        As ``generate(**inputs, search=..., seed=..., **settings)``. Of transformers' own arguments, those that the
        search has are its settings, such as ``temperature`` and ``num_beams``; a value that is transformers' default
        can't be told from nothing. What every search reads from ``model.generation_config``, such as ``eos_token_id``,
        must not differ from that. Everything else raises by name where it would change what is returned. A streamer and
        an ``assistant_model`` never reach a custom function.
        """
        if model is not self.model:
            raise ValueError("model must be the generator's own model, got another one")
        check_kind("settings", settings, (Mapping, NoneType), "a mapping or None")
        prepared = arguments(model, input_ids, generation_config, kwargs, settings_of(search))
        refuse_own(model, input_ids, generation_config, kwargs, logits_processor, stopping_criteria)
        return self.generate(search=search, seed=seed, **{**prepared, **(settings or {})})

    @property
    def backend(self) -> Engine:
        """The engine."""
        return self.engine

    @property
    def source(self) -> str:
        """Where the model was loaded from, if from anywhere."""
        return self.model.config._name_or_path

    @property
    def versions(self) -> dict[str, str]:
        """Those of torch and transformers."""
        return {"torch": torch.__version__, "transformers": transformers.__version__}

    @property
    def weights_sha256(self) -> str | None:
        """The hash of the model's weights, if it was loaded from a folder."""
        return checkpoint_sha256(self.source)

    def open(self, prompt: Prompt | Callable[[], Prompt], plan: Plan) -> Session:
        """See ``Searcher.open``."""
        session = self.engine.open(prompt)
        if not plan.config.draws and not self.engine.processors.is_empty:
            raise ValueError(f"search={plan.name!r} can't apply the logits processors of the model's generation_config")
        return session

    def prompt(self, images: Sequence[Image], question: Question) -> Prompt:
        """Return the processor's inputs for one question."""
        with self._processing:
            prompt = build_inputs(
                self.processor,
                images,
                question,
                self.bos,
                ask=self.grammar.question,
                system=self.system,
                chat_template_kwargs=self.chat_template_kwargs,
            )
        check_fits(prompt, self.model, images=len(images))
        return prompt

    @property
    def turn_tokens(self) -> TurnTokens:
        """Makes the tokens of a user's turn by the chat template."""
        return self._turn_tokens

    def _turn_tokens(self, turn: str, written: Sequence[int]) -> tuple[int, ...]:
        with self._processing:
            return turn_tokens(self.processor, turn, written, **self.chat_template_kwargs)

    def detokeniser(self) -> Detokeniser:
        """What turns the tokens of one continuation into text as they arrive."""
        return Detokeniser(self.vocabulary.token_bytes)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of ``tokens``, without special tokens other than stage tags. A space at its start is kept."""
        return self.detokeniser().add(tokens)


def _require_kind(name: str, value: object, kind: type, what: str) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be {what}, got {type(value).__name__}")
