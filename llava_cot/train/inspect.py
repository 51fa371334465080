"""Show in colours what a run learns from its data: ``llava-cot train CONFIG --inspect N``."""

from itertools import islice

from rich.console import Console
from transformers import AutoProcessor

from llava_cot.data.inspect import show
from llava_cot.data.rows import naming_row, parsed_rows
from llava_cot.stages import STAGES
from llava_cot.train.config import TrainConfig
from llava_cot.train.objectives import objective_of


def print_examples(config: TrainConfig, count: int) -> None:
    """Print the examples of the first ``count`` rows of the run's data as they are trained on."""
    processor, objective, console = AutoProcessor.from_pretrained(config.model), objective_of(config), Console()
    for number, row in islice(parsed_rows(config.data), count):
        with naming_row(config.data, number):
            examples = objective.encode(row, processor, config.images, config.bos)
        for example in examples:
            console.print(show(example, processor, [str(stage) for stage in STAGES]))
            console.rule()
