"""The public face: a model, its processor, and every search on them."""

import json
import reprlib
import threading
import warnings
from collections.abc import Callable, Collection, Generator, Mapping, Sequence, Set
from functools import cached_property
from numbers import Integral
from pathlib import Path
from types import MappingProxyType, NoneType
from typing import Any, Literal, NoReturn, overload

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

from llava_cot.aio import AsyncGenerator
from llava_cot.answer import Answer, Finished
from llava_cot.bundled import model_path
from llava_cot.chat import turn_tokens
from llava_cot.checkpoint import checkpoint_sha256
from llava_cot.core import Bos, Finish, check_kind, whole_number
from llava_cot.custom_generate import SearchOutput, arguments, refuse_own
from llava_cot.detokenise import Detokeniser
from llava_cot.engine.config import EngineConfig
from llava_cot.engine.engine import Engine
from llava_cot.engine.generation_config import SETTINGS
from llava_cot.families import Prompt, family_of
from llava_cot.grammars import GRAMMARS, WHOLE, grammar_of, named_grammar
from llava_cot.image import Images, check_image, images_of, opener
from llava_cot.loading import check_device, check_dtype, check_name, source_of
from llava_cot.prompt import Question, build_inputs, check_fits, check_question, question_text, split_rows
from llava_cot.quantize import check_quantize, loading_settings
from llava_cot.scoring import Calibration
from llava_cot.scoring.scorer import name_of
from llava_cot.search import Plan, Search, SearchLike, SwiresConfig, make_plan, settings_of
from llava_cot.search.events import Event
from llava_cot.search.run import SearchRun
from llava_cot.search.sample import Staged
from llava_cot.search.search import stop_tags
from llava_cot.search.stream import EventStream
from llava_cot.search.tree import Node
from llava_cot.stages import Grammar, asked
from llava_cot.trace import Trace, trace_data
from llava_cot.vocabulary import Vocabulary

CALIBRATION_FILE = "swires_calibration.json"
GRAMMAR_FILE = "swires_grammar.json"
# The settings of a search that ``generate`` takes with transformers' meaning
DECODING = frozenset({*SETTINGS, "max_new_tokens"})


class SwiresGenerator:
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
        self._knows_grammar = known is not None
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

    @cached_property
    def aio(self) -> AsyncGenerator:
        """The same methods for asyncio: ``await generator.aio.answer(...)``."""
        return AsyncGenerator(self)

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

    def answer(
        self, image: Images, question: Question, search: SearchLike = "swires", *, seed: int = 0, **settings: Any
    ) -> Answer:
        """Answer one question, which may be about an image, several or none.

        Args:
            image: a path, a PIL image, bytes or anything else that ``llava_cot.image.open_image`` takes, a list of
                such, or None.
            question: a text, or a conversation that ends with a message of the user (``llava_cot.prompt.Question``).
            search: a name of ``llava_cot.search.POLICIES``, its configuration object, or a policy function.
            seed: everything random comes from it, 0 <= seed < 2**63.
            settings: fields of the search's configuration to change, e.g. ``max_new_tokens=512``.

        Raises:
            ValueError, TypeError: naming the argument that is wrong.
            OutOfPages: the KV cache is too small for this search alone.
            Exception: what a scorer or a policy function raised, when that ended the search. Its ``trace`` attribute
                shows how far the search came.
        """
        return self.answer_batch([image], [question], search, seed=seed, **settings)[0]

    @overload
    def answer_batch(
        self,
        images: Sequence[Images],
        questions: Sequence[Question],
        search: SearchLike = "swires",
        *,
        seed: int = 0,
        return_exceptions: Literal[False] = False,
        **settings: Any,
    ) -> list[Answer]: ...

    @overload
    def answer_batch(
        self,
        images: Sequence[Images],
        questions: Sequence[Question],
        search: SearchLike = "swires",
        *,
        seed: int = 0,
        return_exceptions: Literal[True],
        **settings: Any,
    ) -> list[Answer | Exception]: ...

    def answer_batch(
        self,
        images: Sequence[Images],
        questions: Sequence[Question],
        search: SearchLike = "swires",
        *,
        seed: int = 0,
        return_exceptions: bool = False,
        **settings: Any,
    ) -> list[Answer] | list[Answer | Exception]:
        """Answer many questions as one continuous batch; ``[i]`` equals ``answer(images[i], questions[i], ...)``.

        A search that fails does not touch the others. The first error is raised once all have ended; with
        ``return_exceptions`` each stands where its answer would.
        """
        plan = self.plan(search, **settings)
        runs = self.submit_all(images, questions, plan, seed=seed, return_exceptions=return_exceptions)
        try:
            self.wait(runs)
            return self.answers_of(runs) if return_exceptions else [*map(self.answer_of, runs)]
        finally:
            _cancel(runs)

    def stream(
        self, image: Images, question: Question, search: SearchLike = "swires", *, seed: int = 0, **settings: Any
    ) -> Generator[Event | Finished, None, None]:
        """As ``answer``, but yields events as they happen (``llava_cot.search.events``) and last ``Finished(answer)``.

        Only ``StageFinal`` and ``TextDelta`` carry text that stands; closing the stream frees everything it holds.
        """
        events: list[Event] = []
        plan = self.plan_of_stream(search, **settings)
        run = self.submit(image, question, plan, seed=seed, on_event=events.append)
        try:
            seen = EventStream(run, events, self.detokeniser())
            while not run.done:
                self.engine.step()
                yield from seen.take()
            yield from seen.take()
            yield Finished(self.answer_of(run))
        finally:
            run.cancel()

    # --- What the methods above and below are made of ---

    def plan(self, search: SearchLike = "swires", **settings: Any) -> Plan:
        """Resolve ``search`` and check ``settings``, before anything runs.

        Raises:
            ValueError: naming the argument that is wrong, or the chat template if it can't ask the grammar's turns.
        """
        plan = make_plan(search, settings, self.grammar)
        for turn in self.grammar.turns.values():
            self._turn_tokens(turn, ())  # raises if the chat template can't ask it
        if isinstance(plan.config, Staged) and not self._knows_grammar:
            raise ValueError(
                f"grammar must be named for search={plan.name!r}, since neither the chat template nor the tokenizer of "
                f"this model shows which stages it writes: one of {list(GRAMMARS)} or a Grammar, got None"
            )
        if plan.config.needs_calibration and self._calibration_for(plan) is None:
            warnings.warn(
                f"no calibration of scorer {plan.scorer!r} for this model: nothing will be retraced. "
                "Use generator.calibrate(...) or SwiresConfig(cutoff=...)",
                stacklevel=3,
            )
        return plan

    def plan_of_stream(self, search: SearchLike, **settings: Any) -> Plan:
        """As ``plan``, of a search that returns one answer."""
        plan = self.plan(search, **settings)
        if plan.config.num_answers > 1:
            raise ValueError(f"num_return_sequences must be 1 in a stream, got {plan.config.num_answers}")
        return plan

    def submit(
        self,
        image: Images,
        question: Question,
        plan: Plan,
        *,
        seed: int = 0,
        on_event: Callable[[Event], None] = lambda event: None,
    ) -> SearchRun:
        """Start a search; it goes on whenever the engine steps. Keep the result: a search that nobody holds ends.

        Images are opened when the search is admitted, and closed again once the model has seen them. An image or a
        question that can't be used is the search's error.
        """
        openers = [*map(opener, images_of(image))]

        def open_all() -> list[Image]:
            return [open() for open in openers]

        def prepare() -> Prompt:
            opened = open_all()
            with self._processing:
                prompt = build_inputs(
                    self.processor,
                    opened,
                    question,
                    self.bos,
                    ask=self.grammar.question,
                    system=self.system,
                    chat_template_kwargs=self.chat_template_kwargs,
                )
            check_fits(prompt, self.model, images=len(opened))
            return prompt

        # A question that can't be used fails when it is prepared.
        text = question if isinstance(question, str) else question_text(question) if _is_chat(question) else None
        return self.start(prepare, plan, seed, on_event, text, open_all)

    def submit_all(
        self,
        images: Sequence[Images],
        questions: Sequence[Question],
        plan: Plan,
        *,
        seed: int = 0,
        return_exceptions: bool = False,
    ) -> list[SearchRun]:
        """``submit`` for each question, of which there must be one for each image.

        Unless ``return_exceptions``, questions and types of images are checked and files are looked for before anything
        is started.

        Raises:
            ValueError, TypeError: naming the argument that is wrong.
        """
        for name, items in (("images", images), ("questions", questions)):
            is_wrong = isinstance(items, (str, bytes, Mapping, Set)) or hasattr(items, "columns")  # of a table
            if is_wrong or not isinstance(items, Collection):
                raise TypeError(f"{name} must be a sequence with one entry for each search, got {reprlib.repr(items)}")
        if len(images) != len(questions):
            raise ValueError(f"questions must have one entry per image={len(images)}, got {len(questions)}")
        if not return_exceptions:
            for image, question in zip(images, questions):
                check_question(question)
                for each in images_of(image):
                    check_image(each)
        runs: list[SearchRun] = []
        try:
            for image, question in zip(images, questions):
                runs.append(self.submit(image, question, plan, seed=seed))
        except BaseException:
            _cancel(runs)
            raise
        return runs

    def wait(self, runs: Sequence[SearchRun]) -> None:
        """Step the engine until all ``runs`` have ended."""
        self.engine.run_until(lambda: all(run.done for run in runs))

    def answer_of(self, run: SearchRun, node: Node | None = None) -> Answer:
        """The answer of a search that has ended: its best one, or that of ``node``. Raises what the search raised."""
        if error := self.error_of(run):
            raise error
        node = node or run.result[0]
        text = "".join(asked(turn) + self.decode(tokens) for turn, tokens in node.replies())
        ended = node.finish is Finish.EOS
        stages, violation = self.grammar.parse(text, ended=ended), self.grammar.violation(text, ended=ended)
        return Answer(
            text,
            list(node.path_tokens()),
            stages,
            self.trace_of(run, node),
            run.search.usage,
            self.grammar,
            violation,
            ended or node.closed,
        )

    def answers_of(self, runs: Sequence[SearchRun]) -> list[Answer | Exception]:
        """The answer of each search, or in its place what the search raised."""
        return [self.error_of(run) or self.answer_of(run) for run in runs]

    def error_of(self, run: SearchRun) -> Exception | None:
        """What ended a failed search, with the trace of it as its attribute ``trace``; None if it succeeded."""
        if run.error is not None:
            run.error.trace = self.trace_of(run, None)  # type: ignore[attr-defined]
        return run.error

    def trace_of(self, run: SearchRun, node: Node | None) -> Trace:
        """Everything that a search did, so far if it has not ended. ``node`` is the answer, by default the best one.

        The trace of a running search is made between two steps of the engine, in the thread that steps it.
        """
        search, plan = run.search, run.plan
        calibration = search.calibration
        data = trace_data(
            model=self._folder,
            versions={"torch": torch.__version__, "transformers": transformers.__version__},
            question=search.question,  # None: only its tokens were given
            search=plan.name,
            config=plan.settings(),
            grammar=self.grammar,
            seed=search.seed,
            bos=self.bos,
            calibration={"scorer": calibration.scorer, "data": calibration.data} if calibration else None,
            prompt_tokens=search.session.prompt_tokens,
            **search.to_dict(),
            answer=node.id if node else None,
            answers=[other.id for other in run.result or []],
            usage=search.usage,
            error=run.error,
        )
        return Trace(data)

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
            _cancel(runs)
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

    def calibrate(
        self, images: Sequence[Images], questions: Sequence[Question], *, data: str, seed: int = 0, **settings: Any
    ) -> Calibration:
        """Measure what scores the candidates of each stage get, use the result from now on and return it.

        ``settings`` are those of a ``SwiresConfig`` of one round: the scorer and the sampling to calibrate for.

        ``data`` names what it was measured on. Save it with ``calibration.save(folder / "swires_calibration.json")``.
        """
        check_kind("data", data, str, "a name of what is measured on")
        config = make_plan(SwiresConfig(max_rounds=1, grammar=self.grammar), settings, self.grammar).config
        assert isinstance(config, SwiresConfig)
        answers = self.answer_batch(images, questions, config, seed=seed)
        scores: dict[str, list[float]] = {str(name): [] for name in self.grammar.names}
        for answer in answers:
            for node in answer.trace.nodes.values():
                if node["closed"] and node["stage"] is not None and node["score"] is not None:
                    scores[node["stage"]].append(node["score"])
        silent = [stage for stage, values in scores.items() if not values]
        if silent:
            raise ValueError(f"calibration needs closed candidates of every stage, got none of {silent[0]} on {data!r}")
        calibration = Calibration.fit(name_of(config.scorer), data, scores, checkpoint_sha256(self._folder))
        self.calibrations[calibration.scorer] = calibration
        return calibration

    @property
    def _folder(self) -> str:
        """Where the model was loaded from, if from anywhere."""
        return self.model.config._name_or_path

    def _calibration_for(self, plan: Plan) -> Calibration | None:
        return self.calibrations.get(plan.scorer) if plan.scorer else None

    def _nodes(self, run: SearchRun) -> list[Node]:
        """The nodes that a search returned, the best first. Raises what the search raised."""
        if error := self.error_of(run):
            raise error
        return run.result

    def start(
        self,
        prompt: Prompt | Callable[[], Prompt],
        plan: Plan,
        seed: int,
        on_event: Callable[[Event], None] = lambda event: None,
        question: str | None = None,
        load_images: Callable[[], Sequence[Image]] = tuple,
    ) -> SearchRun:
        """Start a search of a prompt's inputs, or of those that a function makes once it is admitted."""
        if not isinstance(seed, Integral) or isinstance(seed, bool):
            raise TypeError(f"seed must be an integer, got {seed!r}")
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed must be in [0, 2**63), got {seed}")
        seed = int(seed)
        session = self.engine.open(prompt)
        if not plan.config.draws and not self.engine.processors.is_empty:
            raise ValueError(f"search={plan.name!r} can't apply the logits processors of the model's generation_config")
        search = Search(
            session,
            self.decode,
            seed,
            plan.config.max_new_tokens,
            self._calibration_for(plan),
            on_event,
            self.engine.eos_token_ids,
            self.grammar,
            plan.config.budget,
            question,
            load_images,
            self._turn_tokens,
        )
        return SearchRun(search, plan)

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


def _is_chat(question: object) -> bool:
    try:
        check_question(question)
    except ValueError:
        return False
    return True


def _cancel(runs: Sequence[SearchRun]) -> None:
    for run in runs:
        run.cancel()
