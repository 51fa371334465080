"""Build the model of a run: its class, its trained parts, and the masks of its attention."""

import re
from collections.abc import Iterable

import torch
from torch import nn
from transformers import AutoConfig, MllamaForConditionalGeneration, PreTrainedModel

from llava_cot.scoring.reward_model import RewardModel
from llava_cot.train.config import Lora, Part, TrainConfig
from llava_cot.train.cross_rows import install_cross_rows
from llava_cot.train.loss_head import LossHead

PARTS: dict[Part, str] = {
    "vision": r"model\.vision_model\.",
    "projector": r"model\.multi_modal_projector\.",
    "cross": r"model\.language_model\.layers\.(CROSS)\.",
    "language": r"(model\.language_model\.(?!layers\.(CROSS)\.)|lm_head\.|head\.)",
}


def build_model(config: TrainConfig, *, empty: bool) -> PreTrainedModel:
    """Build the model to train on the CPU with its weights, or, with ``empty``, on the meta device without memory.

    Its layers take packed rows (``cross_rows``), its LM head returns log-probs, and its frozen parts need no gradient.

    Raises:
        ValueError: ``config.model`` is not an Mllama, or nothing is left to train.
    """
    settings = AutoConfig.from_pretrained(config.model)
    if settings.model_type != "mllama":
        raise ValueError(f"model must be an Mllama, got {settings.model_type} in {config.model!r}")
    settings.use_cache = settings.get_text_config().use_cache = False  # a recomputed layer would write it twice
    dtype = getattr(torch, config.precision.params)
    model_class = RewardModel if config.objective == "reward" else MllamaForConditionalGeneration
    if empty:
        with torch.device("meta"):
            model = model_class._from_config(settings, dtype=dtype, attn_implementation=config.attention)
    else:
        torch.manual_seed(config.seed)  # for what is not in the checkpoint: adapters, the head of a reward model
        model = model_class.from_pretrained(config.model, dtype=dtype, attn_implementation=config.attention)
    if config.objective == "reward" and not empty:
        _start_reward_head(model, settings)
    if config.lora is not None:
        with torch.device("meta" if empty else "cpu"):
            _add_adapters(model, config.lora)
    else:
        freeze(model, config.freeze)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"freeze must leave something to train, got {list(config.freeze)}")
    if config.objective != "reward":
        model.lm_head = LossHead.of(model.lm_head)
    install_cross_rows(model)
    return model.train()


def freeze(model: PreTrainedModel, parts: Iterable[Part]) -> None:
    """Set ``requires_grad`` to false in these parts of an Mllama. Every parameter belongs to one part."""
    cross = "|".join(map(str, model.config.text_config.cross_attention_layers))
    patterns = [re.compile(PARTS[part].replace("CROSS", cross)) for part in parts]
    for name, parameter in model.named_parameters():
        if any(pattern.match(name) for pattern in patterns):
            parameter.requires_grad_(False)


def _start_reward_head(model: RewardModel, settings) -> None:
    """Zero the head of a reward model that starts from a policy, so that every score is 0 at first."""
    if RewardModel.__name__ not in (settings.architectures or ()):
        nn.init.zeros_(model.head.weight)
        nn.init.zeros_(model.head.bias)


def _add_adapters(model: PreTrainedModel, lora: Lora) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    settings = LoraConfig(
        r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=list(lora.targets), bias="none"
    )
    model.requires_grad_(False)
    inject_adapter_in_model(settings, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
