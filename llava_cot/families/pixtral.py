"""LLaVA and Mistral 3 with Pixtral's vision encoder (Agrawal et al., 2024, arXiv:2410.07073): images have any size."""

from typing import ClassVar

import torch

from llava_cot.families.family import Inputs, Prompt
from llava_cot.families.tiles import Tiles


class Pixtral(Tiles):
    """``image_sizes`` has the height and width of each image in pixels.

    ``pixel_values`` are padded to the largest image of a batch, on the right and below. Without ``image_sizes`` they
    are all image. A token stands for ``spatial_merge_size`` squared patches, or for one.
    """

    inputs: ClassVar[Inputs] = {**Tiles.inputs, "image_sizes": ("images", "sides")}
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
        side = self.config.vision_config.patch_size * getattr(self.config, "spatial_merge_size", 1)
        return [(1, tokens) for tokens in (inputs["image_sizes"] // side).prod(-1).tolist()]
