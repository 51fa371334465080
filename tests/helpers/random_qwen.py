"""Random Qwen2.5-VL and Qwen3-VL models for the bundled Qwen's processor, as small as training needs them."""

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen3VLConfig
from transformers import Qwen3VLForConditionalGeneration as Qwen3VL

from tools.small_world.untrained_qwen import build_config

MODELS = {"qwen2_5_vl": Qwen2_5_VLForConditionalGeneration, "qwen3_vl": Qwen3VL}


def small_config(model_type, processor, *, hidden=32, layers=3, vision_hidden=16):
    """Of Qwen2.5-VL the vision encoder has a layer with windows of one image token. Qwen3-VL's ties its embeddings."""
    full = build_config(processor)
    text = dict(
        vocab_size=full.text_config.vocab_size,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 8,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
        eos_token_id=full.text_config.eos_token_id,
        pad_token_id=full.text_config.pad_token_id,
        bos_token_id=None,
    )
    vision = dict(hidden_size=vision_hidden, intermediate_size=24, num_heads=2, out_hidden_size=hidden, patch_size=8)
    tokens = {
        name: getattr(full, name)
        for name in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    }
    if model_type == "qwen2_5_vl":
        vision |= dict(depth=2, window_size=16, fullatt_block_indexes=[1])
        return Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **tokens)
    text |= dict(head_dim=8, tie_word_embeddings=True)
    text["rope_parameters"]["mrope_interleaved"] = True
    vision |= dict(depth=3, deepstack_visual_indexes=[0, 1], num_position_embeddings=36)
    return Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **tokens)


def build_random_qwen(model_type, processor, *, seed=0, std=0.1, **sizes):
    """A model with random weights that are large enough for an image to matter."""
    torch.manual_seed(seed)
    model = MODELS[model_type](small_config(model_type, processor, **sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, std)
            else:
                parameter.add_(std * torch.randn_like(parameter))
    return model.eval()
