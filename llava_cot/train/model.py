"""Build the model of a run: its class, its trained parts, and the masks of its attention."""

import re
from collections.abc import Iterable

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

from llava_cot.families import training_of
from llava_cot.scoring.reward_model import RewardModel
from llava_cot.train.config import Lora, Part, TrainConfig
from llava_cot.train.loss_head import LossHead


def build_model(config: TrainConfig, *, empty: bool) -> PreTrainedModel:
    """Build the model to train on the CPU with its weights, or, with ``empty``, on the meta device without memory.

    The model takes packed rows, its LM head returns log-probs, and its frozen parts need no gradient.

    Raises:
        ValueError: ``config.model`` is of a family that can't be trained, or not as a reward model, or nothing is left
            to train.
    """
    settings = AutoConfig.from_pretrained(config.model)
    training = training_of(settings)
    settings.use_cache = settings.get_text_config().use_cache = False  # a recomputed layer would write it twice
    options = {"dtype": getattr(torch, config.precision.params), "attn_implementation": config.attention}
    is_reward = config.objective == "reward"
    if is_reward and not isinstance(settings, RewardModel.config_class):
        raise ValueError(
            f"model must be a {RewardModel.config_class.model_type} to be trained as a reward model, "
            f"got model_type {settings.model_type!r}"
        )
    if empty:
        build = RewardModel._from_config if is_reward else AutoModelForImageTextToText.from_config
        with torch.device("meta"):
            model = build(settings, **options)
    else:
        load = RewardModel.from_pretrained if is_reward else AutoModelForImageTextToText.from_pretrained
        torch.manual_seed(config.seed)  # for what is not in the checkpoint: adapters, the head of a reward model
        model = load(config.model, **options)
    if is_reward and not empty:
        _start_reward_head(model, settings)
    if config.lora is not None:
        with torch.device("meta" if empty else "cpu"):
            _add_adapters(model, config.lora)
    else:
        freeze(model, config.freeze)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"freeze must leave something to train, got {list(config.freeze)}")
    if not is_reward:
        model.lm_head = LossHead.of(model.lm_head)
    training.prepare(model)
    return model.train()


def freeze(model: PreTrainedModel, parts: Iterable[Part]) -> None:
    """Set ``requires_grad`` to false in these parts of a model. Every parameter belongs to one part."""
    every = training_of(model.config).parts
    patterns = [re.compile(every[part]) for part in parts]
    for name, parameter in model.named_parameters():
        if any(pattern.match(name) for pattern in patterns):
            parameter.requires_grad_(False)


def _start_reward_head(model: RewardModel, settings: PreTrainedConfig) -> None:
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
