"""The public face: a model, its processor, and every search on them."""

import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL.Image import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

from llava_cot.answer import Answer, Finished, SearchOutput
from llava_cot.checkpoint import checkpoint_sha256
from llava_cot.custom_generate import arguments, refuse_unknown
from llava_cot.engine.branch import Branch
from llava_cot.engine.engine import Engine
from llava_cot.engine.job import Job
from llava_cot.families import family_of
from llava_cot.prompt import Bos, ImageLike, build_inputs, open_image, split_rows
from llava_cot.scoring import Calibration
from llava_cot.scoring.scorer import name_of
from llava_cot.search import POLICIES, SwiresConfig
from llava_cot.search.events import Event, TextDelta
from llava_cot.search.run import run
from llava_cot.search.sample import Limits
from llava_cot.search.search import SENTENCE_ENDS, Search
from llava_cot.search.tree import TRACE_VERSION, Node, Trace
from llava_cot.stages import LLAVA_COT, Grammar
from llava_cot.tiny import tiny_path
from llava_cot_kernels.stage_tags import StageTags

CALIBRATION_FILE = "swires_calibration.json"


@dataclass(frozen=True)
class _Plan:
    """A resolved ``search=``: its name, its settings and the policy bound to them."""

    name: str
    config: Any  # of a policy function its limits
    policy: Callable[[Search], Generator[Any, Any, Node | list[Node]]]


class SwiresGenerator:
    """Stage-level search on an unmodified model (Mllama, LLaVA or Qwen2.5-VL) and its processor.

    ``model`` and ``processor`` stay plain transformers objects; the weights are shared, nothing is patched. One
    generator runs one call at a time, except that calls may be made while a ``stream`` is open. ``grammar`` is that of
    the stages that the model writes; ``page_size`` and what follows it go to ``Engine``.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor,
        *,
        bos: Bos = "one",
        grammar: Grammar = LLAVA_COT,
        calibrations: Sequence[Calibration] = (),
        page_size: int = 16,
        num_pages: int | None = None,
        steps_per_look: int | None = None,
        compile: bool = False,
    ):
        if bos not in ("one", "released"):
            raise ValueError(f"bos must be 'one' or 'released', got {bos!r}")
        self.model, self.processor, self.bos = model, processor, bos
        self.calibrations = {calibration.scorer: calibration for calibration in calibrations}
        self.grammar = grammar
        tags = StageTags.from_tokenizer(processor.tokenizer, [*grammar.close_tags, *SENTENCE_ENDS])
        self.engine = Engine(
            model, tags, page_size=page_size, num_pages=num_pages, steps_per_look=steps_per_look, compile=compile
        )

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device | None = None,
        bos: Bos = "one",
        grammar: Grammar = LLAVA_COT,
        page_size: int = 16,
        num_pages: int | None = None,
        steps_per_look: int | None = None,
        compile: bool = False,
        **kwargs,
    ) -> "SwiresGenerator":
        """Load a model folder or hub name; ``"tiny"`` is the bundled scale model. ``kwargs`` go to transformers.

        A ``swires_calibration.json`` in a local folder is loaded with it.
        """
        path = tiny_path() if str(name) == "tiny" else name
        model = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype, **kwargs)
        if device is not None:
            model = model.to(device)
        processor = AutoProcessor.from_pretrained(path)
        file = Path(path) / CALIBRATION_FILE
        calibrations = Calibration.load_all(file) if file.is_file() else []
        sha256 = checkpoint_sha256(path)
        for calibration in calibrations:
            if calibration.model not in (None, sha256):
                raise ValueError(f"{file} must be of the weights beside it, {sha256}, got one of {calibration.model}")
        return cls(
            model,
            processor,
            bos=bos,
            grammar=grammar,
            calibrations=calibrations,
            page_size=page_size,
            num_pages=num_pages,
            steps_per_look=steps_per_look,
            compile=compile,
        )

    def answer(self, image: ImageLike, question: str, search: Any = "swires", *, seed: int = 0, **settings) -> Answer:
        """Answer one question about one image.

        Args:
            image: a PIL image, an [H, W, 3] uint8 array or a path.
            search: a name of ``llava_cot.search.POLICIES``, its configuration object, or a policy function.
            seed: everything random comes from it, 0 <= seed < 2**63.
            settings: fields of the search's configuration to change, e.g. ``max_new_tokens=512``.

        Raises:
            ValueError, TypeError: naming the argument that is wrong. OutOfPages: the KV cache is too small. What a
            scorer or a policy function raised, when that ended the search.
        """
        return self.answer_batch([image], [question], search, seed=seed, **settings)[0]

    def answer_batch(
        self,
        images: Sequence[ImageLike],
        questions: Sequence[str],
        search: Any = "swires",
        *,
        seed: int = 0,
        return_exceptions: bool = False,
        **settings,
    ) -> list[Any]:
        """Answer many questions as one continuous batch; ``[i]`` equals ``answer(images[i], questions[i], ...)``.

        A search that fails does not touch the others. The first error is raised once all have ended; with
        ``return_exceptions`` each stands where its answer would.
        """
        if len(images) != len(questions):
            raise ValueError(f"questions must have one entry per image={len(images)}, got {len(questions)}")
        plan = self._plan(search, settings)
        jobs = [self._ask(image, question, plan, seed) for image, question in zip(images, questions)]
        self._run(jobs, return_exceptions)
        return [job.error or self._answer(job, job.result[1][0], plan, seed) for job in jobs]

    def stream(
        self, image: ImageLike, question: str, search: Any = "swires", *, seed: int = 0, **settings
    ) -> Generator[Event | Finished, None, None]:
        """As ``answer``, but yields events as they happen (``llava_cot.search.events``) and last ``Finished(answer)``.

        Only ``StageFinal`` and ``TextDelta`` carry text that stands; closing the stream frees everything it holds.
        """
        events: list[Event] = []
        plan = self._plan(search, settings)
        if getattr(plan.config, "num_return_sequences", 1) > 1:
            raise ValueError(f"num_return_sequences must be 1 in a stream, got {plan.config.num_return_sequences}")
        job = self._ask(image, question, plan, seed, events.append)
        shown = ""
        with closing(self.engine.steps([job])) as steps:
            for _ in steps:
                if job.error:
                    raise job.error
                if plan.name in ("greedy", "sample"):
                    branch = job.branches[-1] if job.branches else job.result[1][0].branch  # a job that ended has none
                    text = self._decode(branch.path())
                    whole = branch.finish is not None or not text.endswith("\ufffd")  # or in the middle of a character
                    if whole and text != shown and text.startswith(shown):
                        events.insert(0, TextDelta(text[len(shown) :]))
                        shown = text
                yield from events
                events.clear()
        yield from events
        yield Finished(self._answer(job, job.result[1][0], plan, seed))

    def generate(
        self,
        input_ids: torch.Tensor | None = None,
        *,
        search: Any = "swires",
        seed: int | None = None,
        do_sample: bool | None = None,
        max_length: int | None = None,
        pad_token_id: int | None = None,
        return_dict_in_generate: bool = False,
        **kwargs,
    ) -> torch.Tensor | SearchOutput:
        """Where ``model.generate(**inputs)`` stood: prompts and their continuations, right-padded, int64 [B, T + new].

        Model inputs and decoding arguments keep transformers' names and meaning (``max_new_tokens``, ``temperature``,
        ``top_k``, ``top_p``, ``min_p``, ``num_return_sequences``); other fields of the search's configuration may be
        given too. What is not supported raises by name. Without ``seed`` one is drawn from torch's global generator, so
        that ``torch.manual_seed`` makes a run repeatable. A search that returns several sequences has the best first,
        and fewer than ``num_return_sequences`` where it found fewer that differ.
        """
        names = family_of(self.model.config).inputs
        inputs = {name: kwargs.pop(name) for name in names if name in kwargs}
        rows = split_rows({"input_ids": input_ids, **inputs}, self.model.config)  # type: ignore[dict-item]
        assert input_ids is not None
        if max_length is not None:
            kwargs.setdefault("max_new_tokens", max_length - input_ids.shape[1])
        plan = self._plan(search, kwargs)
        if do_sample is not None and do_sample == (plan.name in ("greedy", "token_beam")):
            raise ValueError(f"do_sample must be {not do_sample} with search={plan.name!r}, got {do_sample}")
        if seed is None:
            seed = int(torch.randint(2**62, ()))
        jobs = [self._job(row, plan, seed) for row in rows]
        self._run(jobs)
        # Without a pad token EOS pads, as in transformers; rows of one length need neither.
        pads = (pad_token_id, self.model.generation_config.pad_token_id, *self.engine.eos_token_ids)
        pad = next((token for token in pads if token is not None), None)
        paths = [(row, node.branch.path()) for row, job in enumerate(jobs) for node in job.result[1]]
        longest = max(len(path) for _, path in paths)
        padded = torch.tensor([path + [pad] * (longest - len(path)) for _, path in paths], device=input_ids.device)
        sequences = torch.cat([input_ids[[row for row, _ in paths]], padded], dim=1)
        if not return_dict_in_generate:
            return sequences
        answers = [self._answer(job, node, plan, seed) for job in jobs for node in job.result[1]]
        scores = [node.score for job in jobs for node in job.result[1]]
        scored = None if None in scores else torch.tensor(scores, dtype=torch.float32, device=sequences.device)
        return SearchOutput(sequences=sequences, sequences_scores=scored, answers=tuple(answers))

    def __call__(
        self,
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: Sequence[Any] = (),
        stopping_criteria: Sequence[Any] = (),
        generation_config: Any = None,
        *,
        search: Any = "swires",
        seed: int | None = None,
        settings: Mapping[str, Any] | None = None,
        **kwargs,
    ) -> torch.Tensor | SearchOutput:
        """``model.generate(**inputs, custom_generate=generator, search=..., seed=..., settings={...})``.

        As ``generate(**inputs, search=..., seed=..., **settings)``. Of transformers' own arguments ``max_new_tokens``,
        ``max_length``, ``num_return_sequences``, ``num_beams``, ``pad_token_id`` and ``return_dict_in_generate`` arrive
        here, and ``temperature``, ``top_k``, ``top_p`` and ``min_p`` where they differ from transformers' defaults:
        those can't be told from nothing. A streamer and ``stop_strings`` never reach a custom function.
        """
        if model is not self.model:
            raise ValueError("model must be the generator's own model, got another one")
        refuse_unknown(logits_processor=logits_processor, stopping_criteria=stopping_criteria)
        prepared = arguments(model, input_ids, generation_config, kwargs)
        return self.generate(search=search, seed=seed, **{**prepared, **(settings or {})})

    def calibrate(
        self, images: Sequence[ImageLike], questions: Sequence[str], *, data: str, seed: int = 0, **settings
    ) -> Calibration:
        """Measure what scores the candidates of each stage get, use the result from now on and return it.

        ``settings`` are those of a ``SwiresConfig`` of one round: the scorer and the sampling to calibrate for.

        ``data`` names what it was measured on. Save it with ``calibration.save(folder / "swires_calibration.json")``.
        """
        config = replace(SwiresConfig(max_rounds=1, grammar=self.grammar), **settings)
        answers = self.answer_batch(images, questions, config, seed=seed)
        scores: dict[str, list[float]] = {str(name): [] for name in self.grammar.names}
        for answer in answers:
            for node in answer.trace.data["nodes"]:
                if node["closed"]:
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

    def _plan(self, search: Any, settings: dict[str, Any]) -> _Plan:
        if callable(search) and not isinstance(search, type):
            limits = Limits(**{name: settings.pop(name) for name in ("max_new_tokens", "budget") if name in settings})
            if settings:
                raise ValueError(f"a policy function must bring its own settings, got {sorted(settings)[0]!r}")
            return _Plan(name_of(search), limits, search)
        by_config = {config_type: name for name, (config_type, _) in POLICIES.items()}
        name = by_config.get(type(search), search)
        if not isinstance(name, str) or name not in POLICIES:
            raise ValueError(f"search must be one of {sorted(POLICIES)}, a config or a policy function, got {search!r}")
        config_type, policy = POLICIES[name]
        known = [field.name for field in fields(config_type)]
        for key in settings:
            if key not in known:
                raise ValueError(f"{key} is not supported by search={name!r}; its settings are {known}")
        own = {"grammar": self.grammar} if "grammar" in known else {}
        config = replace(config_type(**own) if search == name else search, **settings)
        if getattr(config, "grammar", self.grammar) != self.grammar:
            raise ValueError(f"grammar must be the generator's, {self.grammar}, got {config.grammar}")
        wants = getattr(config, "needs_calibration", False)
        if wants and self._calibration_for(config) is None:
            warnings.warn(
                f"no calibration of scorer {name_of(config.scorer)!r} for this model: nothing will be retraced. "
                "Use generator.calibrate(...) or SwiresConfig(cutoff=...)",
                stacklevel=3,
            )
        return _Plan(name, config, lambda search: policy(search, config))

    def _calibration_for(self, config: Any) -> Calibration | None:
        return self.calibrations.get(name_of(getattr(config, "scorer", "")))

    def _ask(
        self,
        image: ImageLike,
        question: str,
        plan: _Plan,
        seed: int,
        on_event: Callable[[Event], None] = lambda event: None,
    ) -> Job:
        opened = open_image(image)
        inputs = build_inputs(self.processor, opened, question, self.bos)
        return self._job(inputs, plan, seed, on_event, question, opened)

    def _job(
        self,
        inputs: dict[str, torch.Tensor],
        plan: _Plan,
        seed: int,
        on_event: Callable[[Event], None] = lambda event: None,
        question: str | None = None,
        image: Image | None = None,
    ) -> Job:
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed must be in [0, 2**63), got {seed}")

        def program(root: Branch):
            search = Search(
                root,
                self._decode,
                seed,
                plan.config.max_new_tokens,
                self._calibration_for(plan.config),
                on_event,
                self.engine.eos_token_ids,
                self.grammar,
                plan.config.budget,
                job.usage,
                question,
                image,
            )
            nodes = yield from run(search, plan.policy)
            return search, nodes

        job = Job(inputs, program)
        return job

    def _run(self, jobs: Sequence[Job], return_exceptions: bool = False) -> None:
        self.engine.run(jobs)
        for job in jobs:
            if job.error and not return_exceptions:
                raise job.error

    def _answer(self, job: Job, node: Node, plan: _Plan, seed: int) -> Answer:
        search, nodes = job.result
        tokens = node.branch.path()
        text = self._decode(tokens)
        calibration = search.calibration
        trace = {
            "version": TRACE_VERSION,
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "model": self._folder,
            "question": search.question,  # None: only its tokens were given
            "search": plan.name,
            "config": _plain(plan.config),
            "grammar": self.grammar.to_dict(),
            "seed": seed,
            "bos": self.bos,
            "calibration": calibration and {"scorer": calibration.scorer, "data": calibration.data},
            "prompt_tokens": job.prompt_length,
            **search.to_dict(),
            "answer": node.id,
            "answers": [other.id for other in nodes],
            "usage": asdict(job.usage),
        }
        violation = self.grammar.violation(text)
        return Answer(text, tokens, self.grammar.parse(text), Trace(trace), job.usage, self.grammar, violation)

    def _decode(self, tokens: list[int]) -> str:
        return self.processor.tokenizer.decode(tokens, skip_special_tokens=True)


def _plain(config: Any) -> dict[str, Any]:
    """The settings as JSON has them; a scorer, which may hold a model, by its name."""
    plain = {key: dict(value) if isinstance(value, Mapping) else value for key, value in vars(config).items()}
    plain.pop("grammar", None)  # the trace has it
    plain["budget"] = config.budget and config.budget.limits()
    return {key: name_of(value) if key == "scorer" else value for key, value in plain.items()}
