"""Translate what transformers hands to a custom function into arguments of ``SwiresGenerator.generate``."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.utils import ModelOutput

from llava_cot.answer import Answer
from llava_cot.engine.generation_config import FOLLOWED, OUTPUTS, SETTINGS, refuse
from llava_cot.families import FAMILIES, family_of

# What transformers itself makes for a forward pass, besides the inputs of the processor
PREPARED = ("position_ids", "cache", "past_key_values", "cache_position", "logits_to_keep", "use_cache")


@dataclass
class SearchOutput(ModelOutput):
    """The output of ``generate(..., return_dict_in_generate=True)``: the sequences, and the answer of every row."""

    sequences: torch.Tensor | None = None  # int64 [B, T + new]
    sequences_scores: torch.Tensor | None = None  # float32 [B]; None if the search scores nothing
    answers: tuple[Answer, ...] | None = None  # one for each of the B rows


def arguments(
    model: Any, input_ids: torch.Tensor, config: Any, inputs: Mapping[str, Any], settings: Collection[str]
) -> dict[str, Any]:
    """Return ``generate``'s arguments for a generation configuration and inputs that transformers has prepared.

    transformers has merged ``config`` from the arguments of the call, ``model.generation_config`` and its own defaults.
    ``settings`` are the names of those of the search.

    Raises:
        ValueError: something was asked for that no search can do, or that a search reads from
            ``model.generation_config`` alone; or transformers has already encoded the images of this model family.
    """
    family = family_of(model.config)
    if not family.has_custom_generate:
        kinds = sorted(name for name, each in FAMILIES.items() if each.has_custom_generate)
        raise ValueError(
            f"model must be one of {kinds}, got model_type {model.config.model_type!r}: "
            "call generator.generate(**inputs) instead"
        )
    own = model.generation_config
    refuse(config)
    for name in OUTPUTS:
        if getattr(config, name, None):
            raise ValueError(f"{name} is not supported by a search, got {getattr(config, name)!r}")
    for name, unset in FOLLOWED.items():
        if name == "min_length" and config.min_new_tokens is not None:
            continue  # transformers has put the sum of that and the prompt here
        if _is_given(config, own, name, unset):
            value, of_model = getattr(config, name), getattr(own, name, None)
            raise ValueError(
                f"{name} must be that of model.generation_config={of_model!r}, got {value!r}: set it there"
            )
    for name, value in inputs.items():
        if value is not None and name not in (*family.inputs, *PREPARED):
            raise ValueError(f"{name} is not supported by a search, got one of type {type(value).__name__}")
    _check_prepared(model, input_ids, inputs)
    decoding = {
        name: getattr(config, name)
        for name, unset in SETTINGS.items()
        # What the model's own configuration says is a default, which a search without this setting does not need.
        if _is_given(config, own, name, unset) or (name in settings and getattr(config, name) not in unset)
    }
    repeats = max(config.num_beams or 1, config.num_return_sequences or 1)  # transformers made this many of each row
    rows = {n: v[::repeats] for n, v in inputs.items() if n in family.inputs and v is not None}
    return {
        **rows,
        "input_ids": input_ids[::repeats],
        "max_new_tokens": config.max_length - input_ids.shape[1],
        **decoding,
        "pad_token_id": _plain(config.pad_token_id),
        "return_dict_in_generate": bool(config.return_dict_in_generate),
    }


def refuse_own(
    model: Any,
    input_ids: torch.Tensor,
    config: Any,
    inputs: Mapping[str, Any],
    logits_processor: Sequence[Any],
    stopping_criteria: Sequence[Any],
) -> None:
    """Raise ``ValueError`` for logits processors and stopping criteria that transformers has not made from ``config``.

    Those it has made are followed already: the fields of ``config`` are.
    """
    made = {
        "logits_processor": model._get_logits_processor(
            config, input_ids.shape[1], input_ids, device=input_ids.device, model_kwargs=inputs
        ),
        "stopping_criteria": model._get_stopping_criteria(config, []),
    }
    for name, items in (("logits_processor", logits_processor), ("stopping_criteria", stopping_criteria)):
        known = [_made_of(item) for item in made[name]]
        for item in items or ():
            if _made_of(item) not in known:
                raise ValueError(f"{name} is not supported by a search, got {type(item).__name__}")


def _is_given(config: Any, own: Any, name: str, unset: tuple[Any, ...]) -> bool:
    """Whether the field ``name`` of a merged ``config`` differs from that of the model's ``own``, and so was given."""
    value, of_model = (_plain(getattr(each, name, None), name) for each in (config, own))
    return value != of_model and not (value in unset and of_model in unset)


def _plain(value: Any, name: str = "") -> Any:
    value = value.tolist() if isinstance(value, torch.Tensor) else value
    if name == "eos_token_id" and value is not None:
        return set(value) if isinstance(value, (list, tuple, set)) else {value}
    return value


def _made_of(item: Any) -> tuple[type, dict[str, Any]]:
    return type(item), {name: _plain(value) for name, value in vars(item).items()}


def _check_prepared(model: Any, input_ids: torch.Tensor, inputs: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` for positions or a cache that are the caller's own."""
    for name in ("cache", "past_key_values"):
        if (cache := inputs.get(name)) is not None and cache.get_seq_length() > 0:
            raise ValueError(f"{name} must be empty, got one of {cache.get_seq_length()} tokens")
    positions = inputs.get("position_ids")
    if positions is not None:
        mask = {"attention_mask": inputs.get("attention_mask")}
        if not (positions == model._prepare_position_ids_for_generation(input_ids, mask)).all():
            raise ValueError("position_ids is not supported by a search, got others than those of the attention_mask")
