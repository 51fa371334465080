"""Random tiny models whose images are tokens of the prompt, LLaVA and Qwen2.5-VL, and random inputs for them."""

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

VOCAB, VISION_START, VISION_END, VIDEO_TOKEN, IMAGE_TOKEN = 97, 93, 94, 95, 96
IMAGE_SIZE, PATCH_SIZE = 28, 14  # LLaVA: 4 tokens an image
GRIDS = [(1, 2, 2), (1, 4, 6), (1, 8, 4), (1, 6, 6)]  # Qwen2.5-VL: time, height and width in patches, 2 x 2 to a token


def build_random_llava(*, vocab=VOCAB, image_token=IMAGE_TOKEN, hidden=32, layers=3, heads=4, kv_heads=2, seed=0):
    torch.manual_seed(seed)
    text = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
    )
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_id=image_token)
    return _randomize(LlavaForConditionalGeneration(config))


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
    "qwen2_5_vl": (build_random_qwen2_5_vl, random_qwen2_5_vl_inputs),
}
