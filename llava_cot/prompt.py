"""From an image and a question to what the model is fed, one sample at a time."""

from os import PathLike
from typing import Literal

import numpy as np
import torch
from PIL import Image

Bos = Literal["one", "released"]
ImageLike = Image.Image | np.ndarray | str | PathLike
MODEL_INPUTS = (
    "input_ids",
    "attention_mask",
    "pixel_values",
    "aspect_ratio_ids",
    "aspect_ratio_mask",
    "cross_attention_mask",
)


def open_image(image: ImageLike) -> Image.Image:
    """An RGB image; raises ``ValueError`` or ``TypeError`` when there is none to be had."""
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise ValueError(f"image must be a uint8 array [H, W, 3], got {image.dtype} {list(image.shape)}")
        image = Image.fromarray(image)
    if isinstance(image, (str, PathLike)):
        try:
            image = Image.open(image)
        except (OSError, Image.DecompressionBombError) as error:
            raise ValueError(f"image must be a readable image file, got {str(image)!r}: {error}") from None
    if not isinstance(image, Image.Image):
        raise TypeError(f"image must be a PIL image, an array or a path, got {type(image).__name__}")
    try:
        return image.convert("RGB")
    except OSError as error:
        raise ValueError(f"image must be a readable image, got one that breaks off: {error}") from None


def build_inputs(processor, image: ImageLike, question: str, bos: Bos) -> dict[str, torch.Tensor]:
    """The processor's inputs for one question: chat template, generation prompt, one BOS.

    The chat template writes a BOS itself; ``bos="released"`` lets the tokenizer add a second one, as the released
    LLaVA-CoT weights were trained.
    """
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"question must be a non-empty string, got {question!r}")
    content = [{"type": "image"}, {"type": "text", "text": question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    batch = processor(
        images=[[open_image(image)]], text=text, add_special_tokens=bos == "released", return_tensors="pt"
    )
    return split_rows(dict(batch))[0]


def split_rows(inputs: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """The rows of a processor's batch, each without its padding. Raises ``ValueError`` naming what does not fit."""
    for name in ("input_ids", "pixel_values", "aspect_ratio_ids", "cross_attention_mask"):
        if inputs.get(name) is None:
            raise ValueError(f"{name} must be given: an image and its prompt, as the processor makes them, got None")
    input_ids, cross_mask = inputs["input_ids"], inputs["cross_attention_mask"]
    if input_ids.dim() != 2 or input_ids.shape[1] == 0:
        raise ValueError(f"input_ids must have shape [batch, tokens >= 1], got {list(input_ids.shape)}")
    for name in MODEL_INPUTS:
        if inputs.get(name) is not None and len(inputs[name]) != len(input_ids):
            raise ValueError(f"{name} must have batch={len(input_ids)} in dimension 0, got {len(inputs[name])}")
    missing = input_ids.shape[1] - cross_mask.shape[1]
    if missing > 0:  # a prompt that goes on past what the processor saw sees what its last token saw
        cross_mask = torch.cat([cross_mask, cross_mask[:, -1:].expand(-1, missing, -1, -1)], dim=1)
    attention_mask = inputs.get("attention_mask")
    keep = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    rows = []
    for index in range(len(input_ids)):
        one = slice(index, index + 1)
        row = {name: inputs[name][one] for name in MODEL_INPUTS[2:] if inputs.get(name) is not None}
        row["input_ids"] = input_ids[index, keep[index]].unsqueeze(0)
        row["cross_attention_mask"] = cross_mask[index, keep[index]].unsqueeze(0)
        if not row["input_ids"].numel() or not row["cross_attention_mask"][0, -1].any():
            raise ValueError(f"input_ids[{index}] must contain the image token, so that its last token sees an image")
        rows.append(row)
    return rows
