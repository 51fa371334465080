"""The model families. Everything that the package must know about a family is in its object."""

from typing import Any

from llava_cot.families.anyres import LlavaNext, LlavaOnevision
from llava_cot.families.family import Family, Prompt
from llava_cot.families.gemma3 import Gemma3
from llava_cot.families.llava import Llava
from llava_cot.families.mllama import Mllama
from llava_cot.families.pixtral import Pixtral
from llava_cot.families.qwen_processor import QwenImageTextProcessor
from llava_cot.families.qwen_vl import Qwen2_5_VL, QwenVL
from llava_cot.families.tiles import Idefics3, Tiles
from llava_cot.families.training import Training

FAMILIES: dict[str, type[Family]] = {  # by the model_type of their configs
    "aya_vision": Tiles,
    "gemma3": Gemma3,
    "glm46v": QwenVL,
    "glm4v": QwenVL,
    "glm4v_moe": QwenVL,
    "idefics3": Idefics3,
    "internvl": Tiles,
    "llava": Llava,
    "llava_next": LlavaNext,
    "llava_onevision": LlavaOnevision,
    "mistral3": Pixtral,
    "mllama": Mllama,
    "qwen2_5_vl": Qwen2_5_VL,
    "qwen2_vl": QwenVL,
    "qwen3_vl": Qwen2_5_VL,
    "qwen3_vl_moe": QwenVL,
    "smolvlm": Idefics3,
    "vipllava": Tiles,
}

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
        raise ValueError(f"model must be one of {trainable} to be trained, got model_type {config.model_type!r}")
    return family.training(config)
