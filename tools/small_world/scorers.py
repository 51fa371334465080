"""The shapes world as a test bed for scorers: what is true of a text, oracles that know it, a trained reward model."""

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path

from PIL.Image import Image

from llava_cot.data import shapes
from llava_cot.scoring.reward_model import RewardModelScorer, verify_policy
from llava_cot.scoring.scorer import Span
from llava_cot.stages import Stage
from llava_cot.tiny import tiny_path

JUDGED = (Stage.CAPTION, Stage.REASONING, Stage.CONCLUSION)
OBJECT = re.compile(rf"({'|'.join(sorted(shapes.CELLS, key=len, reverse=True))}): (\w+) (\w+)")


@dataclass(frozen=True)
class Word:
    """A word of a rollout that carries a fact: characters ``start`` to ``end``, and the word that would be true."""

    start: int
    end: int
    right: bool
    truth: str | None = None  # None: not known


@dataclass(frozen=True)
class Judged:
    """A stage of a rollout: its words in order, and whether it is right as a whole."""

    start: int
    end: int  # behind its closing tag
    words: list[Word]
    right: bool


def judge(sample: shapes.Sample, text: str) -> dict[Stage, Judged]:
    """The stages of ``JUDGED`` that ``text`` closes."""
    judges = {Stage.CAPTION: _judge_caption, Stage.REASONING: _judge_reasoning, Stage.CONCLUSION: _judge_conclusion}
    found = {}
    for stage, judge_stage in judges.items():
        start, close = text.find(stage.open_tag), text.find(stage.close_tag)
        if 0 <= start < close:
            start += len(stage.open_tag)
            words, right = judge_stage(sample, text[start:close])
            words = [replace(word, start=word.start + start, end=word.end + start) for word in words]
            found[stage] = Judged(start, close + len(stage.close_tag), words, right)
    return found


def _judge_caption(sample: shapes.Sample, text: str) -> tuple[list[Word], bool]:
    truth = OBJECT.findall(sample.stages["CAPTION"])
    seen = {cell: words for cell, *words in truth}
    words, items = [], list(OBJECT.finditer(text))
    for index, item in enumerate(items):
        cell, *thing = item.groups()
        words.append(Word(*item.span(1), cell == dict(enumerate(t[0] for t in truth)).get(index)))
        for group, (said, true) in enumerate(zip(thing, seen.get(cell, (None, None))), start=2):
            words.append(Word(*item.span(group), said == true, true))
    return words, [item.groups() for item in items] == truth


def _judge_reasoning(sample: shapes.Sample, text: str) -> tuple[list[Word], bool]:
    # However it is worded, a reasoning on one question has the same numbers in the same order.
    truth = re.findall(r"\d+", sample.stages["REASONING"])
    said = list(re.finditer(r"\d+", text))
    known: list[str | None] = [*truth, *[None] * len(said)]
    words = [Word(*number.span(), number[0] == true, true) for number, true in zip(said, known)]
    if sample.answer in ("yes", "no"):
        return words, ("not more than" in text) == (sample.answer == "no")
    return words, bool(said) and said[-1][0] == sample.answer


def _judge_conclusion(sample: shapes.Sample, text: str) -> tuple[list[Word], bool]:
    right = shapes.is_correct(sample, text)
    start = len(text) - len(text.lstrip())
    return [Word(start, len(text.rstrip()), right, sample.answer)], right


class World:
    """The samples of these seeds, found again by their images: scorers are given images."""

    def __init__(self, seeds: Iterable[int]) -> None:
        self.seeds = list(seeds)
        self.samples = [shapes.sample(seed) for seed in self.seeds]
        self._place = {sample.image.tobytes(): place for place, sample in enumerate(self.samples)}

    def sample_of(self, image: Image | None) -> shapes.Sample:
        assert image is not None
        return self.samples[self._place[image.tobytes()]]

    def clean_view(self, image: Image) -> Image:
        return shapes.clean_view(self.seeds[self._place[image.tobytes()]])

    def is_right(self, span: Span) -> bool:
        """Whether the last stage of the span is: its objects, its verdict, its answer. A SUMMARY always is."""
        if span.stage == Stage.SUMMARY:
            return True
        found = judge(self.sample_of(span.image), span.path_text).get(Stage(span.stage or "CONCLUSION"))
        return found is not None and found.right


class Oracle:
    """The truth, 0 or 1, and normal noise of standard deviation ``noise``, the same for the same text."""

    def __init__(self, world: World, noise: float = 0.0) -> None:
        self.world, self.noise = world, noise
        self.__name__ = f"oracle, noise {noise:g}" if noise else "oracle"

    def __call__(self, spans: Sequence[Span]) -> list[float]:
        return [self.world.is_right(span) + self.noise * self._draw(span) for span in spans]

    def _draw(self, span: Span) -> float:
        assert span.image is not None
        place = blake2b(f"{self.noise}/{span.question}/{span.path_text}".encode() + span.image.tobytes())
        return random.Random(place.digest()).gauss()


def load_reward_model(folder: Path) -> RewardModelScorer:
    """The bundled policy's, as ``llava-cot train-reward`` made it; it sees what the policy sees."""
    verify_policy(folder, tiny_path())
    scorer = RewardModelScorer.from_pretrained(folder)
    scorer.__name__ = "reward model"  # type: ignore[attr-defined]
    return scorer
