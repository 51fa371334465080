"""Step reward models (process reward models) as scorers: a score for every step of a candidate's path."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, TypedDict, Unpack

import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForTokenClassification,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from llava_cot.core import Call, Program, check_kind, whole_number
from llava_cot.engine.config import EngineConfig
from llava_cot.engine.engine import Engine
from llava_cot.families import Prompt, family_of
from llava_cot.scoring.reward_model import pinned_code, sees_images
from llava_cot.scoring.scorer import Span
from llava_cot.scoring.step_chat import StepChat
from llava_cot.scoring.step_format import Split, StepFormat, steps_of
from llava_cot.scoring.step_reader import Asked, EngineReader, FullReader, Reading

Aggregate = Literal["min", "mean", "product", "last"]
AGGREGATES: Mapping[str, Callable[[Sequence[float]], float]] = {
    "min": min,
    "mean": fmean,
    "product": math.prod,
    "last": lambda scores: scores[-1],
}


class _Settings(TypedDict, total=False):
    aggregate: Aggregate
    scope: Literal["path", "stage"]
    split: Split | None
    batch_size: int
    incremental: bool | None
    engine: EngineConfig


class StepRewardScorer:
    """Scores a candidate by a step reward model: the aggregate of its scores for the steps of the candidate's path.

    Each stage of the path is a step, without its tags. The score of each step, in [0, 1], goes into the notes of the
    trace as ``step 1``, ``step 2`` and so on. Where the scores come from two tokens, ``label_mass`` there is the least
    total probability of the two at any step. It is far below 1 if the model expected another format.

    A model of a supported family (``llava_cot.families``) whose verdicts are tokens runs on an engine of its own.
    There the image and the steps that have been read keep their pages for as long as their search runs, and only what
    is new is read, for all candidates of all running searches in one pass. Any other model reads every text as a whole.
    The scores are the same but for rounding.

    The scorer runs in the thread that steps the searching model's engine, and steps its own engine there. One scorer
    may serve several generators in several threads. On a GPU each engine takes half of the memory that is free when it
    is made, so give both a number of pages.

    Args:
        model: a transformers model with a language-model head, or with a head of one or two labels per token.
        processor: the model's processor, or the tokenizer of a model that reads text only. It must have the chat
            template that the model was trained with.
        format: how the model is shown a question and its steps, such as ``QWEN_VL_PRM``.
        aggregate: how the scores of the steps become one: their least, their mean, their product, or the last one.
        scope: whether to aggregate the steps of the whole path, or only those that the candidate has added to it.
        split: takes the text of a stage into several steps, e.g. ``paragraphs``. By default a stage is one step.
        batch_size: the most candidates in one forward pass.
        incremental: whether the model runs on an engine of its own; None means wherever it can.
        engine: how that engine stores and computes.

    Raises:
        ValueError: naming the argument that is wrong; also a mark or a verdict that is not one token, a model without
            the head that ``format`` needs, or ``incremental`` for a model that no engine can run.
        TypeError: an argument of another type.

    Source: arXiv 2305.20050 (the idea), 2503.10291 (VisualPRM), 2509.23250 (Qwen-VL-PRM).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin | PreTrainedTokenizerBase,
        *,
        format: StepFormat,
        aggregate: Aggregate = "min",
        scope: Literal["path", "stage"] = "path",
        split: Split | None = None,
        batch_size: int = 32,
        incremental: bool | None = None,
        engine: EngineConfig = EngineConfig(),  # noqa: B008, it is frozen
    ) -> None:
        check_kind("format", format, StepFormat, "a StepFormat")
        check_kind("engine", engine, EngineConfig, "an EngineConfig")
        if aggregate not in AGGREGATES:
            raise ValueError(f"aggregate must be one of {[*AGGREGATES]}, got {aggregate!r}")
        if scope not in ("path", "stage"):
            raise ValueError(f"scope must be 'path' or 'stage', got {scope!r}")
        batch_size = whole_number("batch_size", batch_size, 1)
        self._chat = StepChat(format, processor)
        if self._chat.is_for_text and sees_images(model.config):
            raise ValueError("processor must be the whole processor of a model that sees images, got its tokenizer")
        _check_head(model, format)
        self.model, self.processor, self.format = model, processor, format
        self.aggregate, self.scope, self.split = aggregate, scope, split
        self.__name__ = f"step_reward_{aggregate}"
        verdicts = self._chat.verdicts
        if incremental is None:
            incremental = verdicts is not None and _is_supported(model.config)
        self._reader: EngineReader | FullReader
        if incremental:
            family_of(model.config)  # raises if it is not supported
            if verdicts is None:
                raise ValueError("incremental must be False for a format without verdicts, got True")
            self._reader = EngineReader(model, verdicts, batch_size, engine)
        else:
            self._reader = FullReader(model, verdicts, batch_size)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        format: StepFormat,
        revision: str | None = None,
        trust_remote_code: bool = False,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = "auto",
        **settings: Unpack[_Settings],
    ) -> "StepRewardScorer":
        """Load a folder or a hub name; ``format`` and ``settings`` are keyword arguments of the constructor.

        ``trust_remote_code`` runs the repository's own code, as Qwen2.5-Math-PRM needs.

        Raises:
            ValueError: ``trust_remote_code`` without a full commit hash as ``revision``, because a branch can change.
        """
        source: dict[str, Any] = pinned_code(revision) if trust_remote_code else {"revision": revision}
        config = AutoConfig.from_pretrained(name, **source)
        if trust_remote_code:
            load = AutoModel
        elif format.verdicts is None:
            load = AutoModelForTokenClassification
        else:
            load = AutoModelForImageTextToText if sees_images(config) else AutoModelForCausalLM
        model = load.from_pretrained(name, dtype=dtype, **source)
        processor = (AutoProcessor if sees_images(config) else AutoTokenizer).from_pretrained(name, **source)
        model = model.to(device).eval() if device is not None else model.eval()
        return cls(model, processor, format=format, **settings)

    @property
    def engine(self) -> Engine | None:
        """The engine that the reward model runs on; None if it reads every text as a whole."""
        return self._reader.engine if isinstance(self._reader, EngineReader) else None

    def close(self) -> None:
        """Give back what the engine holds for searches that still run. They may go on, and read again what they need.

        A search that ends gives back what is its own, so this is rarely needed.
        """
        if isinstance(self._reader, EngineReader):
            self._reader.close()

    def __call__(self, spans: Sequence[Span]) -> Program[list[float]]:
        """Score the spans in one call together with those of other searches."""
        return (yield [Call(self.get_scores, spans)])[0]

    def get_scores(self, spans: Sequence[Span]) -> list[float]:
        """Return one number for each span, the larger the better.

        It reads ``question``, ``images``, ``path_text`` and ``text``.

        Raises:
            ValueError: a span has no question or, for a model that sees images, no image. Or its path has no step.
            OutOfPages: the engine's KV cache is too small for one question alone.
        """
        prompts = _Prompts(self._chat)
        asked, firsts = [], []
        for span in spans:
            steps = steps_of(span.path_text, span.grammar, self.split)
            before = steps_of(span.path_text.removesuffix(span.text), span.grammar, self.split)
            firsts.append(min(len(before), len(steps) - 1) if self.scope == "stage" else 0)
            if not steps:
                raise ValueError(f"path_text must have a step that can be marked, got {span.path_text!r}")
            if span.question is None:
                raise ValueError("a step reward model needs the question of every span, got None")
            path = tuple(self._chat.pieces(steps, span.grammar.all_tags))
            asked.append(Asked(span.memo, partial(prompts.of, span), path))
        scores = []
        for span, first, readings in zip(spans, firsts, self._reader.read(asked), strict=True):
            _note(span, readings)
            scores.append(float(AGGREGATES[self.aggregate]([reading.score for reading in readings[first:]])))
        return scores


class _Prompts:
    """The prompts of one call: one for each question, which is the same if its images are the same objects."""

    def __init__(self, chat: StepChat) -> None:
        self._chat = chat
        self._made: dict[tuple[str, ...], tuple[Sequence[Image.Image], Prompt]] = {}  # images, so that no id is reused

    def of(self, span: Span) -> Prompt:
        images = () if self._chat.is_for_text else span.images
        if not (images or self._chat.is_for_text):
            raise ValueError("a step reward model that sees images needs an image of every span, got none")
        assert span.question is not None
        key = (span.question, *(str(id(image)) for image in images))
        if key not in self._made:
            self._made[key] = images, self._chat.prompt(span.question, images)
        return self._made[key][1]


def _note(span: Span, readings: Sequence[Reading]) -> None:
    span.notes.update({f"step {at}": reading.score for at, reading in enumerate(readings, 1)})
    masses = [reading.label_mass for reading in readings if reading.label_mass is not None]
    if masses:
        span.notes["label_mass"] = min(masses)


def _is_supported(config: PreTrainedConfig) -> bool:
    try:
        family_of(config)
    except ValueError:
        return False
    return True


def _check_head(model: PreTrainedModel, format: StepFormat) -> None:
    """Raise ``ValueError`` unless ``model`` has the head that ``format`` reads."""
    find = getattr(model, "get_output_embeddings", None)
    is_language_model = find is not None and find() is not None
    kind = type(model).__name__
    if format.verdicts is not None:
        if find is not None and not is_language_model:
            raise ValueError(f"model must have a language-model head, whose tokens format.verdicts are, got {kind}")
        return
    if is_language_model:
        raise ValueError(f"model must have a head of labels, since format.verdicts is None, got {kind}")
    labels = getattr(model.config, "num_labels", 1)
    if labels not in (1, 2):
        raise ValueError(f"model must have one or two labels for each token, got num_labels={labels}")
