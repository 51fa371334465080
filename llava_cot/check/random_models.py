"""Models of every family with random weights in the smallest shapes, and inputs like those that processors make."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Generator, Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from llava_cot.families import family_of
from llava_cot.families.tiles import Idefics3

GAIN = 2.3  # times the standard deviation that keeps the size of what a matrix is multiplied with
VOCAB, VISION_START, VISION_END, VIDEO_TOKEN, IMAGE_TOKEN = 97, 93, 94, 95, 96
EOS, PAD = 2, 0
IMAGE_SIZE, PATCH_SIZE = 28, 14
PIXTRAL_SIDES = [(1, 2), (1, 2), (2, 1), (2, 3)]  # height and width in tokens
GRIDS = [(1, 2, 2), (1, 4, 6), (1, 8, 4), (1, 6, 6)]  # time, height and width in patches, 2 x 2 to a token
ANYRES_SIDES = [(30, 50), (50, 30), (40, 40), (28, 80)]  # height and width in pixels
PINPOINTS = [[28, 56], [56, 28], [56, 56]]

TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
# GLM rotates half of each head, and that half must have a part for each of three axes.
GLM = {**TEXT, "head_dim": 16, "hidden_size": 64} | {
    "rope_parameters": {**MROPE["rope_parameters"], "partial_rotary_factor": 0.5}
}
GLM_EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
ONE_TILE = {**VISION, "image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE}  # 2 x 2 patches
FOUR_TO_ONE = {**ONE_TILE, "image_size": 2 * IMAGE_SIZE}  # 4 x 4 patches, and 2 x 2 of them to a token
PIXTRAL = {**VISION, "model_type": "pixtral", "head_dim": 8, "image_size": 4 * PATCH_SIZE, "patch_size": PATCH_SIZE}
QWEN_VISION = {"depth": 2, "num_heads": 2, "patch_size": 4}
QWEN3_VISION = {
    **QWEN_VISION,
    **{"hidden_size": 16, "intermediate_size": 32, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]},
}
GLM_VISION = {**QWEN_VISION, "hidden_size": 16, "intermediate_size": 64, "image_size": 32, "out_hidden_size": 64}
GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 7, "sliding_window_pattern": 3}
CLIP, SIGLIP = {"model_type": "clip_vision_model"}, {"model_type": "siglip_vision_model"}
LLAMA, QWEN2, MISTRAL = {"model_type": "llama"}, {"model_type": "qwen2"}, {"model_type": "mistral"}
COHERE2 = {"model_type": "cohere2", "sliding_window": 5, "sliding_window_pattern": 2, "pad_token_id": PAD}

# name -> (model_type, settings of its config); for some families there are several
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "aya_vision": ("aya_vision", {"text_config": {**COHERE2, **TEXT}, "vision_config": {**SIGLIP, **FOUR_TO_ONE}}),
    "gemma3": (  # two local layers to a global one, and a window that is wider than an image
        "gemma3",
        {
            "text_config": {**TEXT, **GEMMA},
            "vision_config": {**ONE_TILE, "patch_size": PATCH_SIZE // 2},
            "mm_tokens_per_image": 4,
        },
    ),
    "glm46v": ("glm46v", {"text_config": GLM, "vision_config": GLM_VISION}),
    "glm4v": ("glm4v", {"text_config": GLM, "vision_config": GLM_VISION}),
    "glm4v_moe": ("glm4v_moe", {"text_config": {**GLM, **GLM_EXPERTS}, "vision_config": GLM_VISION}),
    "idefics3": (
        "idefics3",
        {"text_config": {**LLAMA, **TEXT}, "vision_config": FOUR_TO_ONE, "scale_factor": 2},
    ),
    "internvl": (
        "internvl",
        {
            "text_config": {**QWEN2, **TEXT},
            "vision_config": {**FOUR_TO_ONE, "image_size": [2 * IMAGE_SIZE] * 2, "patch_size": [PATCH_SIZE] * 2},
            "image_seq_length": 4,
        },
    ),
    "llava": ("llava", {"text_config": {**LLAMA, **TEXT}, "vision_config": {**CLIP, **ONE_TILE}}),
    "llava_next": (
        "llava_next",
        {
            "text_config": {**LLAMA, **TEXT},
            "vision_config": {**CLIP, **ONE_TILE},
            "image_grid_pinpoints": PINPOINTS,
            "image_seq_length": 4,
        },
    ),
    "llava_onevision": (
        "llava_onevision",
        {
            "text_config": {**QWEN2, **TEXT},
            "vision_config": {**SIGLIP, **ONE_TILE},
            "image_grid_pinpoints": PINPOINTS,
            "vision_aspect_ratio": "anyres_max_2",
        },
    ),
    "mistral3": (
        "mistral3",
        {"text_config": {**MISTRAL, **TEXT, "sliding_window": None, "head_dim": 8}, "vision_config": PIXTRAL},
    ),
    "pixtral": (
        "llava",
        {
            "text_config": {**LLAMA, **TEXT},
            "vision_config": PIXTRAL,
            "vision_feature_select_strategy": "full",
            "vision_feature_layer": -1,
        },
    ),
    "qwen2_5_vl": (
        "qwen2_5_vl",
        {
            "text_config": {**TEXT, **MROPE},
            "vision_config": {
                **QWEN_VISION,
                **{"hidden_size": 16, "intermediate_size": 32, "out_hidden_size": 32, "window_size": 16},
                "fullatt_block_indexes": [1],
            },
        },
    ),
    "qwen2_vl": (
        "qwen2_vl",
        {
            "text_config": {**TEXT, **MROPE},
            "vision_config": {**QWEN_VISION, "embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2},
        },
    ),
    "qwen3_vl": (
        "qwen3_vl",
        {
            "text_config": {**TEXT, **MROPE, "head_dim": 8},
            "vision_config": {**QWEN3_VISION, "out_hidden_size": 32},
        },
    ),
    "qwen3_vl_moe": (
        "qwen3_vl_moe",
        {
            "text_config": {**TEXT, **MROPE, **EXPERTS, "head_dim": 8},
            "vision_config": {**QWEN3_VISION, "out_hidden_size": 32},
        },
    ),
    "smolvlm": ("smolvlm", {"text_config": {**LLAMA, **TEXT}, "vision_config": FOUR_TO_ONE, "scale_factor": 2}),
    "windowed": (  # the first layer attends to everything, the others to a window
        "llava",
        {
            "text_config": {**QWEN2, **TEXT, "use_sliding_window": True, "sliding_window": 10, "max_window_layers": 1},
            "vision_config": {**CLIP, **ONE_TILE},
        },
    ),
    "vipllava": (
        "vipllava",
        {
            "text_config": {**LLAMA, **TEXT},
            "vision_config": {**CLIP, **ONE_TILE, "num_hidden_layers": 11},  # it takes the features of five layers
            "image_seq_length": 4,
        },
    ),
}


def build_config(name: str, *, vocab: int = VOCAB, image_token: int | None = None, **text: Any) -> PreTrainedConfig:
    """Return the config of a name in ``CONFIGS``, with ``text`` changed in that of its language model.

    The last four tokens of ``vocab`` begin and end an image, and stand for a video and an image.
    """
    model_type, settings = CONFIGS[name]
    settings = settings | {"tie_word_embeddings": False}
    settings["text_config"] = {**settings["text_config"], "vocab_size": vocab, **text}
    if "out_hidden_size" in settings["vision_config"]:  # the width of the text
        width = settings["text_config"]["hidden_size"]
        settings["vision_config"] = {**settings["vision_config"], "out_hidden_size": width}
    kind = transformers.CONFIG_MAPPING[model_type]
    known = {
        "video_token_id": VIDEO_TOKEN,
        "vision_start_token_id": VISION_START,
        "vision_end_token_id": VISION_END,
        "image_start_token_id": VISION_START,
        "image_end_token_id": VISION_END,
    }
    special = {key: value + vocab - VOCAB for key, value in known.items() if hasattr(kind(), key)}
    special["image_token_id"] = vocab - VOCAB + IMAGE_TOKEN if image_token is None else image_token
    return kind(**settings, **special)


def build_model(name: str, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Return a model of a name in ``CONFIGS``, with the ``changes`` that ``build_config`` takes.

    Its weights are so large that every token and every pixel matters.
    """
    torch.manual_seed(seed)
    model = transformers.AutoModelForImageTextToText.from_config(build_config(name, **changes))
    randomize(model)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = EOS, PAD
    return model.eval()


def randomize(model: PreTrainedModel) -> None:
    """Draw every matrix anew. The image token is never the most likely one."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, GAIN / math.sqrt(parameter[0].numel()))
        model.get_output_embeddings().weight[model.config.image_token_id] = 0


def make_inputs(model: PreTrainedModel, *, length: int, seed: int, images: int = 1) -> dict[str, Tensor]:
    """Return a processor's inputs for one prompt of ``length`` tokens, those of its images included.

    Where the family's images have any size, each of them has its own.
    """
    generator = torch.Generator().manual_seed(seed)
    family = family_of(model.config)
    pixels, tokens = _images(model.config, family, [seed + image for image in range(images)], generator)
    if not images:
        pixels = {}
    inputs = _prompt(generator, length, tokens) | pixels
    for name in family.inputs:
        if name.endswith("token_type_ids"):
            inputs[name] = (inputs["input_ids"] == model.config.image_token_id).int()
    return inputs


def _images(
    config: PreTrainedConfig, family: Any, seeds: Sequence[int], generator: Generator
) -> tuple[dict[str, Tensor], list[int]]:
    """Return the image inputs, and the tokens of each image."""
    names, vision = family.inputs, config.vision_config

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    if "image_grid_thw" in names:
        grids = torch.tensor([GRIDS[seed % len(GRIDS)] for seed in seeds]).reshape(-1, 3)
        channels = 3 * vision.temporal_patch_size * vision.patch_size**2
        pixels = {"pixel_values": normal(int(grids.prod(-1).sum()), channels), "image_grid_thw": grids}
    elif "image_sizes" in names and names["pixel_values"][1] == "tiles":
        sizes = torch.tensor([ANYRES_SIDES[seed % len(ANYRES_SIDES)] for seed in seeds]).reshape(-1, 2)
        pixels = {"pixel_values": normal(len(seeds), 5, 3, IMAGE_SIZE, IMAGE_SIZE), "image_sizes": sizes}
        if "batch_num_images" in names:
            pixels["batch_num_images"] = torch.tensor([len(seeds)])
    elif "image_sizes" in names:
        side = PATCH_SIZE * getattr(config, "spatial_merge_size", 1)
        sizes = torch.tensor([PIXTRAL_SIDES[seed % len(PIXTRAL_SIDES)] for seed in seeds]).reshape(-1, 2) * side
        values = torch.zeros(len(seeds), 3, *(sizes.amax(0).tolist() if seeds else (side, side)))
        for image, (height, width) in zip(values, sizes.tolist()):
            image[:, :height, :width] = normal(3, height, width)
        pixels = {"pixel_values": values, "image_sizes": sizes}
    else:
        side = vision.image_size if isinstance(vision.image_size, int) else vision.image_size[0]
        values = normal(len(seeds), 3, side, side)
        if isinstance(family, Idefics3):
            return {
                "pixel_values": values.unsqueeze(0),
                "pixel_attention_mask": torch.ones(1, len(seeds), side, side, dtype=torch.bool),
            }, [4] * len(seeds)
        return {"pixel_values": values}, [4] * len(seeds)
    return pixels, [tokens for _, tokens in family.image_sizes(pixels, 0)]


def _prompt(generator: Generator, length: int, image_tokens: Sequence[int]) -> dict[str, Tensor]:
    """Return one text token, then images between their start and end tokens, then text."""
    ids = torch.randint(3, 90, (1, length), generator=generator)
    start = 1
    for count in image_tokens:
        ids[0, start : start + count + 2] = torch.tensor([VISION_START, *[IMAGE_TOKEN] * count, VISION_END])
        start += count + 2
    if start >= length:
        raise ValueError(f"length must be > {start}, so that the prompt ends with text, got {length}")
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
