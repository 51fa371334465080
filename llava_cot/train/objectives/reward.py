"""Learn how good an answer is so far, at the end of each of its stages."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import binary_cross_entropy_with_logits
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from llava_cot.core import Bos
from llava_cot.data.collate import Batch
from llava_cot.data.encode import check_counts
from llava_cot.data.example import IGNORE_INDEX, Example
from llava_cot.literal import marked, token_ids
from llava_cot.stages import LLAVA_COT, STAGES
from llava_cot.train.objectives.objective import Losses
from llava_cot.train.objectives.rows import image_files


class Reward:
    """Binary cross-entropy of the score of a ``RewardModel`` at the end of each stage.

    The score is a logit, and its target is the value of the step.

    Each end is an example of its own: the text up to there, as ``RewardModelScorer`` reads it. One pass over the whole
    answer could score all ends, but not as a search scores them. In a search the text ends with the tag. Inside an
    answer, the last token of the tag may include the line breaks after it. The examples of an answer share its image,
    which is read once.
    """

    names = (*(f"accuracy/{stage}" for stage in STAGES), "accuracy/outside")
    reference = None

    def encode(self, row: Mapping[str, Any], processor: ProcessorMixin, images: Path, bos: Bos) -> list[Example]:
        """Return one example per stage, with its value, of a row of ``llava-cot export --format steps``.

        Special tokens that the question or the answer spells are text, but for the tags of stages.
        """
        completions, stages, values = _steps(row)
        if bos != "one":
            raise ValueError(f"bos must be 'one', which is what RewardModelScorer reads, got {bos!r}")
        tokenizer = processor.tokenizer
        prompt = processor.apply_chat_template(_messages(row, tokenizer), add_generation_prompt=True)
        tags = {tag for stage in {*STAGES, *stages} for tag in LLAVA_COT.tag_pair(stage)}
        files = image_files(row, images)
        examples = []
        for end, (stage, value) in enumerate(zip(stages, values), 1):
            text = "".join(completions[:end]).rstrip()
            ids = token_ids(prompt + marked(text, tokenizer, keep=tags), tokenizer)
            check_counts("prompt must have", ids, processor, images=len(files), bos=bos)
            place = STAGES.index(stage) if stage in STAGES else -1
            none = [IGNORE_INDEX] * len(ids)
            examples.append(Example(ids, none, [-1] * (len(ids) - 1) + [place], files, float(value)))
        return examples

    def weight(self, batch: Batch) -> float:
        return float(len(batch.ends))

    def __call__(self, model: PreTrainedModel, batch: Batch) -> Losses:
        hidden = model.model(**batch.inputs, use_cache=False).last_hidden_state
        scores = model.head(hidden.flatten(0, 1)[batch.ends]).float().squeeze(-1)
        values = torch.tensor(batch.values, device=scores.device)
        loss = binary_cross_entropy_with_logits(scores, values, reduction="sum")
        says_more = values != 0.5  # at 0.5 no score is right
        right = ((scores > 0) == (values > 0.5))[says_more]
        places = batch.stages.flatten()[batch.ends - 1][says_more] % len(self.names)
        parts = torch.zeros(len(self.names), 2, device=scores.device)
        parts.index_add_(0, places, torch.stack([right, torch.ones_like(right)], 1).float())
        return Losses(loss, parts)


def _steps(row: Mapping[str, Any]) -> tuple[list[str], list[str], list[float]]:
    columns: list[Any] = [row.get(name) for name in ("completions", "stages", "values")]
    for name, column in zip(("completions", "stages", "values"), columns):
        if not isinstance(column, list) or not column:
            raise ValueError(f"{name} must be a list with an entry for each stage, got {str(column)[:80]!r}")
    completions, stages, values = columns
    if not len(completions) == len(stages) == len(values):
        got = f"{len(completions)}, {len(stages)} and {len(values)}"
        raise ValueError(f"completions, stages and values must have an entry for each stage, got {got}")
    if wrong := [value for value in values if not (isinstance(value, int | float) and 0 <= value <= 1)]:
        raise ValueError(f"values must be in [0, 1], got {wrong[0]!r}")
    return completions, stages, values


def _messages(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    prompt = row.get("prompt")
    if not isinstance(prompt, list) or not prompt:
        raise ValueError(f"prompt must be messages, got {str(prompt)[:80]!r}")
    return [{**turn, "content": [_known(part, tokenizer) for part in turn["content"]]} for turn in prompt]


def _known(part: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    # In a table, every part of a message has the keys of all parts, filled with nulls.
    known = {key: value for key, value in part.items() if value is not None}
    return known | {"text": marked(known["text"], tokenizer)} if "text" in known else known
