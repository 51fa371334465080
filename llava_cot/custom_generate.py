"""What transformers hands to a custom function, as arguments of ``SwiresGenerator.generate``."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.utils import ModelOutput

from llava_cot.answer import Answer
from llava_cot.families import FAMILIES, family_of


@dataclass
class SearchOutput(ModelOutput):
    """``generate(..., return_dict_in_generate=True)``: what it returns otherwise, and every row's answer."""

    sequences: torch.Tensor | None = None  # int64 [B, T + new]
    sequences_scores: torch.Tensor | None = None  # float32 [B], of a search that scores what it returns
    answers: tuple[Answer, ...] | None = None  # of B rows


# What transformers itself makes of its arguments before it calls a custom function
KNOWN = {
    "logits_processor": ("TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper", "MinPLogitsWarper"),
    "stopping_criteria": ("MaxLengthCriteria", "EosTokenCriteria"),
}
# Its defaults, which can't be told from nothing
UNSET: dict[str, tuple[Any, ...]] = {
    "temperature": (1.0, None),
    "top_k": (50, None),
    "top_p": (1.0, None),
    "min_p": (None,),
    "num_beams": (1, None),
    "num_return_sequences": (1, None),
}


def refuse_unknown(**given: Sequence[Any]) -> None:
    """Raise ``ValueError`` for a logits processor or a stopping criterion that the caller brought."""
    for name, items in given.items():
        for item in items or ():
            if type(item).__name__ not in KNOWN[name]:
                raise ValueError(f"{name} is not supported by a search, got {type(item).__name__}")


def arguments(model: Any, input_ids: Any, config: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """``generate``'s arguments, of a generation configuration and of inputs that transformers has prepared.

    Raises:
        ValueError: the model's family is one of which transformers has encoded the images already.
    """
    family = family_of(model.config)
    if not family.has_custom_generate:
        kinds = sorted(name for name, each in FAMILIES.items() if each.has_custom_generate)
        raise ValueError(
            f"model must be one of {kinds}, got model_type {family.model_type!r}: "
            "call generator.generate(**inputs) instead"
        )
    repeats = max(config.num_beams or 1, config.num_return_sequences or 1)  # of every row, made already
    rows = {n: v[::repeats] for n, v in inputs.items() if n in family.inputs and v is not None}
    return {
        **rows,
        "input_ids": input_ids[::repeats],
        "max_new_tokens": config.max_length - input_ids.shape[1],
        **{name: getattr(config, name) for name, unset in UNSET.items() if getattr(config, name) not in unset},
        "pad_token_id": config.pad_token_id,
        "return_dict_in_generate": bool(config.return_dict_in_generate),
    }
