"""Random tiny models whose images are tokens of the prompt, and random inputs for them: three of each kind of image."""

from functools import partial

import torch
from transformers import LlavaForConditionalGeneration

from llava_cot.check.random_models import (
    EOS,
    IMAGE_SIZE,
    PAD,
    PATCH_SIZE,
    build_config,
    build_model,
    make_inputs,
    randomize,
)

FAMILIES = {name: (partial(build_model, name), make_inputs) for name in ("llava", "pixtral", "qwen2_5_vl")}
__all__ = ["FAMILIES", "IMAGE_SIZE", "PATCH_SIZE", "build_random_llava"]


def build_random_llava(*, vocab, image_token, seed=0):
    """A LLaVA for a tokenizer."""
    torch.manual_seed(seed)
    config = build_config("llava")
    config.text_config.vocab_size, config.image_token_id = vocab, image_token
    model = LlavaForConditionalGeneration(config)
    randomize(model)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = EOS, PAD
    return model.eval()
