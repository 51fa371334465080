"""The model of a run: which class, what of it is trained, where its attention's masks come from."""

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
    """The model to train, on the CPU with its weights, or ``empty`` on the meta device, which costs nothing.

    Its layers take packed rows (``cross_rows``), its LM head returns log-probs, and what is frozen is.

    Raises:
        ValueError: ``config.model`` is no Mllama, or nothing is left to train.
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
        torch.manual_seed(config.seed)  # of what is not in the checkpoint: adapters, a reward model's head
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
    """Take ``requires_grad`` from these parts of an Mllama; every parameter belongs to one."""
    cross = "|".join(map(str, model.config.text_config.cross_attention_layers))
    patterns = [re.compile(PARTS[part].replace("CROSS", cross)) for part in parts]
    for name, parameter in model.named_parameters():
        if any(pattern.match(name) for pattern in patterns):
            parameter.requires_grad_(False)


def _start_reward_head(model: RewardModel, settings) -> None:
    """A reward model that was not one before gives 0 to everything at first."""
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
