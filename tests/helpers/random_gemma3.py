"""A tiny Gemma 3 whose images are 28 pixels wide and have four tokens."""

import torch
from transformers import Gemma3Config, Gemma3ForConditionalGeneration


def random_gemma3(*, vocab, image_token, hidden=32, layers=3, heads=4, kv_heads=2, seed=0, window=7, image_tokens=4):
    """Two local layers to a global one. The window is smaller than most prompts, and wider than an image."""
    torch.manual_seed(seed)
    text = dict(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=hidden // heads,
        query_pre_attn_scalar=hidden // heads,
        max_position_embeddings=4096,
        sliding_window=window,
        sliding_window_pattern=3,
    )
    vision = dict(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=7
    )
    config = Gemma3Config(
        text_config=text,
        vision_config=vision,
        image_token_index=image_token,
        mm_tokens_per_image=image_tokens,
        tie_word_embeddings=False,
    )
    return Gemma3ForConditionalGeneration(config)
