"""Random tiny models whose images are tokens of the prompt, and random inputs for them."""

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PixtralVisionConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
)

from helpers.random_gemma3 import random_gemma3

VOCAB, VISION_START, VISION_END, VIDEO_TOKEN, IMAGE_TOKEN = 97, 93, 94, 95, 96
IMAGE_SIZE, PATCH_SIZE = 28, 14  # LLaVA: 4 tokens an image
SIDES = [(1, 2), (1, 2), (2, 1), (2, 3)]  # Pixtral: height and width in patches, which are tokens
GRIDS = [(1, 2, 2), (1, 4, 6), (1, 8, 4), (1, 6, 6)]  # Qwen2.5-VL: time, height and width in patches, 2 x 2 to a token


def build_random_llava(
    *,
    vocab=VOCAB,
    image_token=IMAGE_TOKEN,
    hidden=32,
    layers=3,
    heads=4,
    kv_heads=2,
    seed=0,
    pixtral=False,
    text=LlamaConfig,
    **of_text,
):
    torch.manual_seed(seed)
    text = text(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        **of_text,
    )
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "patch_size": PATCH_SIZE}
    if pixtral:
        vision = PixtralVisionConfig(**sizes, num_attention_heads=2, head_dim=8, image_size=4 * PATCH_SIZE)
        features = {"vision_feature_select_strategy": "full", "vision_feature_layer": -1}
    else:
        vision, features = CLIPVisionConfig(**sizes, num_attention_heads=4, image_size=IMAGE_SIZE), {}
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_id=image_token, **features)
    return _randomize(LlavaForConditionalGeneration(config))


def build_random_pixtral(**sizes):
    """A LLaVA whose vision encoder takes images of any size."""
    return build_random_llava(pixtral=True, **sizes)


def build_random_windowed(**sizes):
    """A LLaVA on Qwen2: the first layer attends to everything, the others to a window."""
    return build_random_llava(
        text=Qwen2Config, use_sliding_window=True, sliding_window=10, max_window_layers=1, **sizes
    )


def build_random_gemma3(**sizes):
    return _randomize(random_gemma3(vocab=VOCAB, image_token=IMAGE_TOKEN, **sizes))


def build_random_qwen2_5_vl(*, hidden=32, layers=3, heads=4, kv_heads=2, seed=0):
    torch.manual_seed(seed)
    text = dict(
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
        tie_word_embeddings=False,
    )
    vision = dict(
        depth=2,
        hidden_size=16,
        intermediate_size=32,
        num_heads=2,
        out_hidden_size=hidden,
        patch_size=4,
        window_size=16,
        fullatt_block_indexes=[1],
    )
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE_TOKEN,
        video_token_id=VIDEO_TOKEN,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
    )
    return _randomize(Qwen2_5_VLForConditionalGeneration(config))


def _randomize(model, std=0.4):
    """Weights so large that every token matters; the image token is never the one to draw."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, std)
        model.lm_head.weight[model.config.image_token_id] = 0
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 2, 0
    return model.eval()


def random_llava_inputs(model, *, length, seed, images=1):
    """A processor's inputs for one prompt of ``length`` tokens, those of its images included."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(images, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    per_image = (IMAGE_SIZE // PATCH_SIZE) ** 2
    return {**_prompt(generator, length, [per_image] * images), "pixel_values": pixels}


def random_gemma3_inputs(model, **prompt):
    """As those of a LLaVA, of as many tokens an image."""
    inputs = random_llava_inputs(model, **prompt)
    return {**inputs, "token_type_ids": (inputs["input_ids"] == IMAGE_TOKEN).int()}


def random_pixtral_inputs(model, *, length, seed, images=1):
    """As above; every image has a size of its own, and its pixels are padded to the largest."""
    generator = torch.Generator().manual_seed(seed)
    patches = torch.tensor([SIDES[(seed + image) % len(SIDES)] for image in range(images)])
    sizes = patches * PATCH_SIZE
    pixels = torch.zeros(images, 3, *sizes.amax(0).tolist())
    for image, (height, width) in zip(pixels, sizes.tolist()):
        image[:, :height, :width] = torch.randn(3, height, width, generator=generator)
    return {**_prompt(generator, length, patches.prod(-1).tolist()), "pixel_values": pixels, "image_sizes": sizes}


def random_qwen2_5_vl_inputs(model, *, length, seed, images=1):
    """As above; every image has a size of its own."""
    generator = torch.Generator().manual_seed(seed)
    grids = torch.tensor([GRIDS[(seed + image) % len(GRIDS)] for image in range(images)])
    inputs = _prompt(generator, length, (grids.prod(-1) // 4).tolist())
    pixels = torch.randn(int(grids.prod(-1).sum()), 3 * 2 * 4 * 4, generator=generator)
    is_image = (inputs["input_ids"] == IMAGE_TOKEN).int()
    return {**inputs, "pixel_values": pixels, "image_grid_thw": grids, "mm_token_type_ids": is_image}


def _prompt(generator, length, image_tokens):
    """One text token, then images between their start and end tokens, then text."""
    ids = torch.randint(3, 90, (1, length), generator=generator)
    start = 1
    for count in image_tokens:
        ids[0, start : start + count + 2] = torch.tensor([VISION_START, *[IMAGE_TOKEN] * count, VISION_END])
        start += count + 2
    assert start < length, "the prompt must end with text"
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


FAMILIES = {
    "llava": (build_random_llava, random_llava_inputs),
    "windowed": (build_random_windowed, random_llava_inputs),
    "gemma3": (build_random_gemma3, random_gemma3_inputs),
    "pixtral": (build_random_pixtral, random_pixtral_inputs),
    "qwen2_5_vl": (build_random_qwen2_5_vl, random_qwen2_5_vl_inputs),
}
