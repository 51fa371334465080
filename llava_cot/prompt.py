"""From an image and a question to what the model is fed, one sample at a time."""

from typing import Literal

import torch

from llava_cot.image import ImageLike, open_image

Bos = Literal["one", "released"]
MODEL_INPUTS = {  # what the processor makes, by the model_type of the model's config
    "mllama": (
        "input_ids",
        "attention_mask",
        "pixel_values",
        "aspect_ratio_ids",
        "aspect_ratio_mask",
        "cross_attention_mask",
    ),
    "llava": ("input_ids", "attention_mask", "pixel_values"),
    "qwen2_5_vl": ("input_ids", "attention_mask", "pixel_values", "image_grid_thw", "mm_token_type_ids"),
}
OPTIONAL_INPUTS = {"attention_mask", "aspect_ratio_mask", "mm_token_type_ids"}


def build_inputs(processor, image: ImageLike, question: str, bos: Bos) -> dict[str, torch.Tensor]:
    """The processor's inputs for one question: chat template, generation prompt, one BOS.

    Most chat templates write a BOS themselves; ``bos="released"`` lets the tokenizer add a second one, as the released
    LLaVA-CoT weights were trained.
    """
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"question must be a non-empty string, got {question!r}")
    content = [{"type": "image"}, {"type": "text", "text": question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    written = text.startswith(processor.tokenizer.bos_token or "")
    batch = processor(
        images=[[open_image(image)]],
        text=text,
        add_special_tokens=bos == "released" or not written,
        return_tensors="pt",
    )
    return {name: tensor for name, tensor in batch.items() if name != "attention_mask"}  # nothing is padded


def split_rows(inputs: dict[str, torch.Tensor], config) -> list[dict[str, torch.Tensor]]:
    """The rows of a processor's batch, each without its padding. Raises ``ValueError`` naming what does not fit.

    ``config`` is the model's: it says what there must be, and which tokens stand for images.
    """
    names = MODEL_INPUTS[config.model_type]
    for name in names:
        if name not in OPTIONAL_INPUTS and inputs.get(name) is None:
            raise ValueError(f"{name} must be given: an image and its prompt, as the processor makes them, got None")
    input_ids = inputs["input_ids"]
    if input_ids.dim() != 2 or input_ids.shape[1] == 0:
        raise ValueError(f"input_ids must have shape [batch, tokens >= 1], got {list(input_ids.shape)}")
    in_cross_attention = "cross_attention_mask" in names
    for name in names if in_cross_attention else ("attention_mask",):
        if inputs.get(name) is not None and len(inputs[name]) != len(input_ids):
            raise ValueError(f"{name} must have batch={len(input_ids)} in dimension 0, got {len(inputs[name])}")
    attention_mask = inputs.get("attention_mask")
    keep = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    if keep.shape != input_ids.shape:
        shapes = f"the shape of input_ids={list(input_ids.shape)}, got {list(keep.shape)}"
        raise ValueError(f"attention_mask must have {shapes}")
    rows = [{"input_ids": ids[kept].unsqueeze(0)} for ids, kept in zip(input_ids, keep)]
    images = _cross_attention_images(inputs, keep) if in_cross_attention else _prompt_images(inputs, rows, config)
    return [row | image for row, image in zip(rows, images)]


def _cross_attention_images(inputs: dict[str, torch.Tensor], keep: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """The image inputs of each row of a model with cross-attention, all of which have a row for each prompt."""
    names = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
    cross_mask = inputs["cross_attention_mask"]
    missing = keep.shape[1] - cross_mask.shape[1]
    if missing > 0:  # a prompt that goes on past what the processor saw sees what its last token saw
        cross_mask = torch.cat([cross_mask, cross_mask[:, -1:].expand(-1, missing, -1, -1)], dim=1)
    images = []
    for index, kept in enumerate(keep):
        image = {name: inputs[name][index : index + 1] for name in names if inputs.get(name) is not None}
        image["cross_attention_mask"] = cross_mask[index, kept].unsqueeze(0)
        if not kept.any() or not image["cross_attention_mask"][0, -1].any():
            raise ValueError(f"input_ids[{index}] must contain the image token, so that its last token sees an image")
        images.append(image)
    return images


def _prompt_images(
    inputs: dict[str, torch.Tensor], rows: list[dict[str, torch.Tensor]], config
) -> list[dict[str, torch.Tensor]]:
    """The image inputs of each row where images are tokens of the prompt: they come in the order of their tokens.

    ``pixel_values`` has an entry for each image, or with ``image_grid_thw`` [images, 3] one for each of its patches,
    of which ``spatial_merge_size`` squared make a token.
    """
    pixels, grids = inputs["pixel_values"], inputs.get("image_grid_thw")
    counts = [int((row["input_ids"] == config.image_token_id).sum()) for row in rows]
    if grids is None:
        entries = [1] * len(pixels)
        tokens = [sum(counts) // max(1, len(pixels))] * len(pixels)  # images of one size
    else:
        entries = grids.prod(-1).tolist()
        tokens = [patches // config.vision_config.spatial_merge_size**2 for patches in entries]
    if sum(entries) != len(pixels):
        raise ValueError(f"pixel_values must have image_grid_thw's patches={sum(entries)} rows, got {len(pixels)}")
    images, first, start = [], 0, 0
    for index, count in enumerate(counts):
        if not count:
            raise ValueError(f"input_ids[{index}] must contain the image token, so that its last token sees an image")
        last = first
        while last < len(tokens) and sum(tokens[first:last]) < count:
            last += 1
        if sum(tokens[first:last]) != count:
            expected = sum(tokens[first:last])
            raise ValueError(f"input_ids[{index}] must have its images' tokens={expected}, got {count} image tokens")
        end = start + sum(entries[first:last])
        image = {"pixel_values": pixels[start:end]}
        if grids is not None:
            image["image_grid_thw"] = grids[first:last]
        images.append(image)
        first, start = last, end
    if first != len(tokens):
        raise ValueError(f"pixel_values must have the images of input_ids={first}, got {len(tokens)}")
    return images
