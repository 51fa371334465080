"""The public face: a model, its processor, and every search on them."""

import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoProcessor, MllamaForConditionalGeneration

from llava_cot.answer import Answer, Finished, SearchOutput
from llava_cot.engine.branch import Branch
from llava_cot.engine.engine import Engine
from llava_cot.engine.job import Job
from llava_cot.prompt import MODEL_INPUTS, Bos, ImageLike, build_inputs, split_rows
from llava_cot.scoring import Calibration
from llava_cot.search import POLICIES, SwiresConfig
from llava_cot.search.events import Event, TextDelta
from llava_cot.search.search import Search
from llava_cot.search.tree import TRACE_VERSION, Node, Trace
from llava_cot.stages import STAGES, parse
from llava_cot.tiny import tiny_path
from llava_cot_kernels.stage_tags import StageTags

CALIBRATION_FILE = "swires_calibration.json"


@dataclass(frozen=True)
class _Plan:
    """A resolved ``search=``: its name, its settings and the policy bound to them."""

    name: str
    config: Any
    policy: Callable[[Search], Generator[Any, Any, Node | list[Node]]]
    max_new_tokens: int


class SwiresGenerator:
    """Stage-level search on an unmodified Mllama and its processor.

    ``model`` and ``processor`` stay plain transformers objects; the weights are shared, nothing is patched. One
    generator runs one call at a time, except that calls may be made while a ``stream`` is open.
    """

    def __init__(
        self,
        model: MllamaForConditionalGeneration,
        processor,
        *,
        bos: Bos = "one",
        calibration: Calibration | None = None,
        page_size: int = 16,
        num_pages: int | None = None,
    ):
        if bos not in ("one", "released"):
            raise ValueError(f"bos must be 'one' or 'released', got {bos!r}")
        self.model, self.processor, self.bos, self.calibration = model, processor, bos, calibration
        tags = StageTags.from_tokenizer(processor.tokenizer, [stage.close_tag for stage in STAGES])
        self.engine = Engine(model, tags, page_size=page_size, num_pages=num_pages)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device | None = None,
        bos: Bos = "one",
        page_size: int = 16,
        num_pages: int | None = None,
        **kwargs,
    ) -> "SwiresGenerator":
        """Load a model folder or hub name; ``"tiny"`` is the bundled scale model. ``kwargs`` go to transformers.

        A ``swires_calibration.json`` in a local folder is loaded with it.
        """
        path = tiny_path() if str(name) == "tiny" else name
        model = MllamaForConditionalGeneration.from_pretrained(path, dtype=dtype, **kwargs)
        if device is not None:
            model = model.to(device)
        processor = AutoProcessor.from_pretrained(path)
        file = Path(path) / CALIBRATION_FILE
        calibration = Calibration.load(file) if file.is_file() else None
        return cls(model, processor, bos=bos, calibration=calibration, page_size=page_size, num_pages=num_pages)

    def answer(self, image: ImageLike, question: str, search: Any = "swires", *, seed: int = 0, **settings) -> Answer:
        """Answer one question about one image.

        Args:
            image: a PIL image, an [H, W, 3] uint8 array or a path.
            search: a name of ``llava_cot.search.POLICIES``, its configuration object, or a policy function.
            seed: everything random comes from it, 0 <= seed < 2**63.
            settings: fields of the search's configuration to change, e.g. ``max_new_tokens=512``.

        Raises:
            ValueError, TypeError: naming the argument that is wrong. OutOfPages: the KV cache is too small.
        """
        return self.answer_batch([image], [question], search, seed=seed, **settings)[0]

    def answer_batch(
        self,
        images: Sequence[ImageLike],
        questions: Sequence[str],
        search: Any = "swires",
        *,
        seed: int = 0,
        **settings,
    ) -> list[Answer]:
        """Answer many questions as one continuous batch; ``[i]`` equals ``answer(images[i], questions[i], ...)``."""
        if len(images) != len(questions):
            raise ValueError(f"questions must have one entry per image={len(images)}, got {len(questions)}")
        plan = self._plan(search, settings)
        jobs = [
            self._job(build_inputs(self.processor, image, question, self.bos), plan, seed)
            for image, question in zip(images, questions)
        ]
        self.engine.run(jobs)
        return [self._answer(job, job.result[1][0], plan, seed, asked) for job, asked in zip(jobs, questions)]

    def stream(
        self, image: ImageLike, question: str, search: Any = "swires", *, seed: int = 0, **settings
    ) -> Generator[Event | Finished, None, None]:
        """As ``answer``, but yields events as they happen (``llava_cot.search.events``) and last ``Finished(answer)``.

        Only ``StageFinal`` and ``TextDelta`` carry text that stands; closing the stream frees everything it holds.
        """
        events: list[Event] = []
        plan = self._plan(search, settings)
        job = self._job(build_inputs(self.processor, image, question, self.bos), plan, seed, events.append)
        shown = ""
        with closing(self.engine.steps([job])) as steps:
            for _ in steps:
                if plan.name in ("greedy", "sample"):
                    branch = job.branches[1] if job.branches else job.result[1][0].branch  # a job that ended has none
                    text = self._decode(branch.tokens)
                    whole = branch.finish is not None or not text.endswith("\ufffd")  # or in the middle of a character
                    if whole and text != shown and text.startswith(shown):
                        events.insert(0, TextDelta(text[len(shown) :]))
                        shown = text
                yield from events
                events.clear()
        yield from events
        yield Finished(self._answer(job, job.result[1][0], plan, seed, question))

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
        ``top_k``, ``top_p``, ``min_p``, ``num_return_sequences`` with ``search="sample"``); other fields of the
        search's configuration may be given too. What is not supported raises by name. Without ``seed`` one is drawn
        from torch's global generator, so that ``torch.manual_seed`` makes a run repeatable.
        """
        inputs = {name: kwargs.pop(name) for name in MODEL_INPUTS[1:] if name in kwargs}
        rows = split_rows({"input_ids": input_ids, **inputs})  # type: ignore[dict-item]
        assert input_ids is not None
        if max_length is not None:
            kwargs.setdefault("max_new_tokens", max_length - input_ids.shape[1])
        plan = self._plan(search, kwargs)
        if do_sample is not None and do_sample == (plan.name in ("greedy", "token_beam")):
            raise ValueError(f"do_sample must be {not do_sample} with search={plan.name!r}, got {do_sample}")
        if seed is None:
            seed = int(torch.randint(2**62, ()))
        jobs = [self._job(row, plan, seed) for row in rows]
        self.engine.run(jobs)
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

    def calibrate(
        self, images: Sequence[ImageLike], questions: Sequence[str], *, data: str, seed: int = 0, **settings
    ) -> Calibration:
        """Measure what scores the candidates of each stage get, use the result from now on and return it.

        ``data`` names what it was measured on. Save it with ``calibration.save(folder / "swires_calibration.json")``.
        """
        config = replace(SwiresConfig(max_rounds=1), **settings)
        answers = self.answer_batch(images, questions, config, seed=seed)
        scores: dict[str, list[float]] = {stage.value: [] for stage in STAGES}
        for answer in answers:
            for node in answer.trace.data["nodes"]:
                if node["closed"]:
                    scores[node["stage"]].append(node["score"])
        silent = [stage for stage, values in scores.items() if not values]
        if silent:
            raise ValueError(f"calibration needs closed candidates of every stage, got none of {silent[0]} on {data!r}")
        self.calibration = Calibration.fit(_name(config.scorer), data, scores)
        return self.calibration

    def _plan(self, search: Any, settings: dict[str, Any]) -> _Plan:
        if callable(search) and not isinstance(search, type):
            limit = settings.pop("max_new_tokens", SwiresConfig.max_new_tokens)
            if settings:
                raise ValueError(f"a policy function must bring its own settings, got {sorted(settings)[0]!r}")
            return _Plan(_name(search), None, search, limit)
        by_config = {config_type: name for name, (config_type, _) in POLICIES.items()}
        name = by_config.get(type(search), search)
        if not isinstance(name, str) or name not in POLICIES:
            raise ValueError(f"search must be one of {sorted(POLICIES)}, a config or a policy function, got {search!r}")
        config_type, policy = POLICIES[name]
        known = [field.name for field in fields(config_type)]
        for key in settings:
            if key not in known:
                raise ValueError(f"{key} is not supported by search={name!r}; its settings are {known}")
        config = replace(config_type() if search == name else search, **settings)
        if config.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be >= 1, got {config.max_new_tokens}")
        retraces = name == "swires" and config.retrace and config.max_rounds > 1
        if retraces and config.cutoff is None and self._calibration_for(config) is None:
            warnings.warn(
                f"no calibration of scorer {_name(config.scorer)!r} for this model: nothing will be retraced. "
                "Use generator.calibrate(...) or SwiresConfig(cutoff=...)",
                stacklevel=3,
            )
        return _Plan(name, config, lambda search: policy(search, config), config.max_new_tokens)

    def _calibration_for(self, config: Any) -> Calibration | None:
        scorer = _name(getattr(config, "scorer", ""))
        return self.calibration if self.calibration and self.calibration.scorer == scorer else None

    def _job(
        self, inputs: dict[str, torch.Tensor], plan: _Plan, seed: int, on_event: Callable[[Event], None] | None = None
    ) -> Job:
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed must be in [0, 2**63), got {seed}")

        def program(root: Branch):
            search = Search(
                root,
                self._decode,
                seed,
                plan.max_new_tokens,
                self._calibration_for(plan.config),
                on_event or (lambda event: None),
                self.engine.eos_token_ids,
            )
            result = yield from plan.policy(search)
            return search, result if isinstance(result, list) else [result]

        return Job(inputs, program)

    def _answer(self, job: Job, node: Node, plan: _Plan, seed: int, question: str | None = None) -> Answer:
        search = job.result[0]
        tokens = node.branch.path()
        text = self._decode(tokens)
        calibration = search.calibration
        trace = {
            "version": TRACE_VERSION,
            "question": question,  # None: only its tokens were given
            "search": plan.name,
            "config": plan.config and _plain(plan.config),
            "seed": seed,
            "bos": self.bos,
            "calibration": calibration and {"scorer": calibration.scorer, "data": calibration.data},
            "prompt_tokens": job.prompt_length,
            **search.to_dict(),
            "answer": node.id,
            "usage": asdict(job.usage),
        }
        return Answer(text, tokens, parse(text), Trace(trace), job.usage)

    def _decode(self, tokens: list[int]) -> str:
        return self.processor.tokenizer.decode(tokens, skip_special_tokens=True)


def _name(scorer: Any) -> str:
    return scorer if isinstance(scorer, str) else getattr(scorer, "__name__", type(scorer).__name__)


def _plain(config: Any) -> dict[str, Any]:
    """The settings as JSON has them; a scorer, which may hold a model, by its name."""
    plain = {key: dict(value) if isinstance(value, Mapping) else value for key, value in vars(config).items()}
    return {key: _name(value) if key == "scorer" else value for key, value in plain.items()}
