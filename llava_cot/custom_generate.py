"""Translate what transformers hands to a custom function into arguments of ``SwiresGenerator.generate``."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.utils import ModelOutput

from llava_cot.answer import Answer
from llava_cot.families import FAMILIES, family_of


@dataclass
class SearchOutput(ModelOutput):
    """The output of ``generate(..., return_dict_in_generate=True)``: the sequences, and the answer of every row."""

    sequences: torch.Tensor | None = None  # int64 [B, T + new]
    sequences_scores: torch.Tensor | None = None  # float32 [B]; None if the search scores nothing
    answers: tuple[Answer, ...] | None = None  # one for each of the B rows


# The classes that transformers itself builds from its arguments before it calls a custom function
KNOWN = {
    "logits_processor": ("TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper", "MinPLogitsWarper"),
    "stopping_criteria": ("MaxLengthCriteria", "EosTokenCriteria"),
}
# The defaults of transformers, which look the same as an argument that was not given
UNSET: dict[str, tuple[Any, ...]] = {
    "temperature": (1.0, None),
    "top_k": (50, None),
    "top_p": (1.0, None),
    "min_p": (None,),
    "num_beams": (1, None),
    "num_return_sequences": (1, None),
}


def refuse_unknown(**given: Sequence[Any]) -> None:
    """Raise ``ValueError`` for a logits processor or a stopping criterion of the caller's own."""
    for name, items in given.items():
        for item in items or ():
            if type(item).__name__ not in KNOWN[name]:
                raise ValueError(f"{name} is not supported by a search, got {type(item).__name__}")


def arguments(model: Any, input_ids: Any, config: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``generate``'s arguments for a generation configuration and inputs that transformers has prepared.

    Raises:
        ValueError: transformers has already encoded the images of this model family.
    """
    family = family_of(model.config)
    if not family.has_custom_generate:
        kinds = sorted(name for name, each in FAMILIES.items() if each.has_custom_generate)
        raise ValueError(
            f"model must be one of {kinds}, got model_type {family.model_type!r}: "
            "call generator.generate(**inputs) instead"
        )
    repeats = max(config.num_beams or 1, config.num_return_sequences or 1)  # transformers made this many of each row
    rows = {n: v[::repeats] for n, v in inputs.items() if n in family.inputs and v is not None}
    return {
        **rows,
        "input_ids": input_ids[::repeats],
        "max_new_tokens": config.max_length - input_ids.shape[1],
        **{name: getattr(config, name) for name, unset in UNSET.items() if getattr(config, name) not in unset},
        "pad_token_id": config.pad_token_id,
        "return_dict_in_generate": bool(config.return_dict_in_generate),
    }
