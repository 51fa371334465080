"""The bundled world of shapes as a benchmark: its questions are made, not read."""

import io
from pathlib import Path

from llava_cot.data import shapes
from llava_cot.evaluate.benchmark import Benchmark, Dataset
from llava_cot.evaluate.question import Question, Verdict


class World(Benchmark):
    """The public test range of the shapes world: seeds 800,000 to 899,999. ``shapes.is_correct`` is its only judge."""

    name = "world"
    title = "Shapes world"
    default_preset = "plain"
    default_rules = own_rules = "exact"

    def __init__(self, path: Path | str | None = None, *, allow_partial: bool = False) -> None:
        if path is not None:
            raise ValueError(f"data must not be given for the world, whose questions are made, got {str(path)!r}")
        seeds = shapes.TEST_SEEDS
        self.dataset = Dataset(None, f"shapes-{seeds.start}-{seeds.stop - 1}", "shapes, version 1", len(seeds))

    def __len__(self) -> int:
        return len(shapes.TEST_SEEDS)

    def question(self, number: int) -> Question:
        seed = shapes.TEST_SEEDS[number]
        sample = shapes.sample(seed)
        return Question(f"shapes-{seed}", "open", sample.question, sample.answer, group=f"shapes-{seed}")

    def number_of(self, id: str) -> int:
        seed = id.removeprefix("shapes-")
        if seed == id or not seed.isdecimal() or int(seed) not in shapes.TEST_SEEDS:
            raise KeyError(id)
        return shapes.TEST_SEEDS.index(int(seed))

    def images(self, number: int) -> tuple[bytes]:
        file = io.BytesIO()
        shapes.sample(shapes.TEST_SEEDS[number]).image.save(file, "png")
        return (file.getvalue(),)

    def prompt(self, question: Question, preset: str) -> str:
        return question.text if preset == "plain" else super().prompt(question, preset)

    def verdict(self, question: Question, answer: str, rules: str) -> Verdict:
        sample = shapes.sample(int(question.id.removeprefix("shapes-")))
        return Verdict(float(shapes.is_correct(sample, answer)), answer, "shapes.is_correct")
