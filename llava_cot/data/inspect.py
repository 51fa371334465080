"""Show a training example: its tokens, coloured by stage."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.text import Text

from llava_cot.data.example import IGNORE_INDEX, Example

if TYPE_CHECKING:
    from transformers import ProcessorMixin

COLOURS = ("green", "cyan", "yellow", "magenta", "blue", "red")


def show(example: Example, processor: "ProcessorMixin", names: Sequence[str]) -> Text:
    """Return the text of an example with a legend: one colour per stage, context dimmed, images in reverse."""
    text = Text()
    for index, name in enumerate(names):
        text.append(f" {name} ", f"bold {_colour(index)}")
    learnt = sum(label != IGNORE_INDEX for label in example.labels)
    text.append(f" {learnt} of {len(example.labels)} tokens are learnt\n")
    for path in example.images:
        text.append(f"{path}\n", "reverse")
    for token, label, stage in _runs(example, processor.image_token_id):
        ids = example.input_ids[token.start : token.stop]
        style = "reverse" if ids[0] == processor.image_token_id else "dim" if label else _colour(stage)
        text.append(processor.tokenizer.decode(ids, clean_up_tokenization_spaces=False), style)
    return text.append("\n")


def _colour(stage: int) -> str:
    return COLOURS[stage % len(COLOURS)] if stage >= 0 else "bold"


def _runs(example: Example, image_token: int) -> Iterator[tuple[slice, bool, int]]:
    """Yield slices of equal style as (slice, is ignored, stage), so that characters of several tokens stay whole."""
    keys = [
        (token == image_token, label == IGNORE_INDEX, stage)
        for token, label, stage in zip(example.input_ids, example.labels, example.stages)
    ]
    start = 0
    for end in range(1, len(keys) + 1):
        if end == len(keys) or keys[end] != keys[start] or keys[end][0]:
            yield slice(start, end), keys[start][1], keys[start][2]
            start = end
