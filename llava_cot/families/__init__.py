"""The model families. Everything that the package must know about a family is in its object."""

from typing import Any

from llava_cot.families.family import Family, Prompt
from llava_cot.families.llava import Llava
from llava_cot.families.mllama import Mllama
from llava_cot.families.qwen2_5_vl import Qwen2_5_VL
from llava_cot.families.qwen3_vl import Qwen3_VL
from llava_cot.families.qwen_processor import QwenImageTextProcessor
from llava_cot.families.training import Training

FAMILIES: dict[str, type[Family]] = {family.model_type: family for family in (Llava, Mllama, Qwen2_5_VL, Qwen3_VL)}

__all__ = ["FAMILIES", "Family", "Prompt", "QwenImageTextProcessor", "Training", "family_of", "training_of"]


def family_of(config: Any) -> Family:
    """Return the family of the model with this transformers config.

    Raises:
        ValueError: the family is not supported.
    """
    if config.model_type not in FAMILIES:
        raise ValueError(f"model must be one of {sorted(FAMILIES)}, got model_type {config.model_type!r}")
    return FAMILIES[config.model_type].of(config)


def training_of(config: Any) -> Training:
    """Return the training parts of the family of the model with this transformers config.

    Raises:
        ValueError: the family is not supported, or its models can't be trained.
    """
    family = family_of(config)
    if family.training is None:
        trainable = sorted(name for name, each in FAMILIES.items() if each.training is not None)
        raise ValueError(f"model must be one of {trainable} to be trained, got model_type {family.model_type!r}")
    return family.training(config)
