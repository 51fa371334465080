"""Show in colours what a run learns from its data: ``llava-cot train CONFIG --inspect N``."""

import json
from itertools import islice

from rich.console import Console
from transformers import AutoProcessor

from llava_cot.data.inspect import show
from llava_cot.stages import STAGES
from llava_cot.train.config import TrainConfig
from llava_cot.train.objectives import objective_of


def print_examples(config: TrainConfig, count: int) -> None:
    """Print the examples of the first ``count`` rows of the run's data as they are trained on."""
    processor, objective, console = AutoProcessor.from_pretrained(config.model), objective_of(config), Console()
    with config.data.open(encoding="utf-8") as file:
        for line in islice(file, count):
            for example in objective.encode(json.loads(line), processor, config.images, config.bos):
                console.print(show(example, processor, [str(stage) for stage in STAGES]))
                console.rule()
