"""LLaVA (Liu et al., 2023, arXiv:2304.08485), also with Pixtral's vision encoder: image tokens are in the prompt."""

from typing import Any, ClassVar

import torch

from llava_cot.families.family import Family, Inputs, Prompt


class Llava(Family):
    """Images have one size, that of the vision encoder."""

    model_type = "llava"
    inputs: ClassVar[Inputs] = {
        "input_ids": ("batch", "tokens"),
        "attention_mask": ("batch", "tokens"),
        "pixel_values": ("images", "channels", "height", "width"),
    }

    @classmethod
    def of(cls, config: Any) -> Family:
        return Pixtral(config) if config.vision_config.model_type == "pixtral" else cls(config)


class Pixtral(Llava):
    """Images have any size (Agrawal et al., 2024, arXiv:2410.07073). A token stands for a patch.

    ``image_sizes`` has the height and width of each image in pixels. ``pixel_values`` are padded to the largest image
    of a batch, on the right and below. Without ``image_sizes`` they are all image.
    """

    inputs: ClassVar[Inputs] = {**Llava.inputs, "image_sizes": ("images", "sides")}
    optional = frozenset({"attention_mask", "image_sizes"})

    @property
    def sizes(self) -> dict[str, int]:
        return {"sides": 2}

    def split_images(self, inputs: Prompt, keep: torch.Tensor) -> list[Prompt]:
        pixels = inputs["pixel_values"]
        sizes = inputs.get("image_sizes")
        if sizes is None:
            sizes = torch.tensor([pixels.shape[-2:]] * len(pixels), device=pixels.device)
        if (sizes > torch.tensor(pixels.shape[-2:], device=sizes.device)).any():
            raise ValueError(f"image_sizes must be within pixel_values={list(pixels.shape[-2:])}, got {sizes.tolist()}")
        prompts = super().split_images({**inputs, "image_sizes": sizes}, keep)
        for prompt in filter(None, prompts):
            height, width = prompt["image_sizes"].amax(0).tolist()
            prompt["pixel_values"] = prompt["pixel_values"][..., :height, :width]
        return prompts

    def image_sizes(self, inputs: Prompt, image_tokens: int) -> list[tuple[int, int]]:
        sides = inputs["image_sizes"] // self.config.vision_config.patch_size
        return [(1, tokens) for tokens in sides.prod(-1).tolist()]
