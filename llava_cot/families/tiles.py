"""Families whose vision encoder sees tiles of one size, each of which becomes the same number of tokens.

LLaVA (Liu et al., 2023, arXiv:2304.08485) and ViP-LLaVA (Cai et al., 2023, arXiv:2312.00784) scale an image to one
tile. InternVL (Chen et al., 2024, arXiv:2412.05271) and Aya Vision (Dash et al., 2025, arXiv:2505.08751) cut it into
several, and so do Idefics3 (Laurençon et al., 2024, arXiv:2408.12637) and SmolVLM (Marafioti et al., 2025,
arXiv:2504.05299).
"""

from typing import ClassVar

import torch

from llava_cot.families.family import Family, Inputs, Prompt


class Tiles(Family):
    """``pixel_values`` has an entry for each tile. Which tiles are of one image, only the prompt's text shows."""

    inputs: ClassVar[Inputs] = {
        "input_ids": ("batch", "tokens"),
        "attention_mask": ("batch", "tokens"),
        "pixel_values": ("images", "channels", "height", "width"),
    }


class Idefics3(Family):
    """``pixel_values`` has a row for each prompt, padded with tiles of zeros to the prompt that has the most."""

    inputs: ClassVar[Inputs] = {
        "input_ids": ("batch", "tokens"),
        "attention_mask": ("batch", "tokens"),
        "pixel_values": ("batch", "images", "channels", "height", "width"),
        "pixel_attention_mask": ("batch", "images", "height", "width"),
    }
    optional = frozenset({"attention_mask", "pixel_attention_mask"})

    def split_images(self, inputs: Prompt, keep: torch.Tensor) -> list[Prompt]:
        vision = self.config.vision_config
        per_tile = (vision.image_size // vision.patch_size) ** 2 // self.config.scale_factor**2
        names = [name for name in self.inputs if name.startswith("pixel") and inputs.get(name) is not None]
        prompts = list[Prompt]()
        for index, (ids, kept) in enumerate(zip(inputs["input_ids"], keep)):
            tiles = int(inputs["pixel_values"][index].flatten(1).any(1).sum())
            tokens = int((ids[kept] == self.config.image_token_id).sum())
            if tokens != tiles * per_tile:
                raise ValueError(
                    f"input_ids[{index}] must have its images' tokens={tiles * per_tile}, got {tokens} image tokens"
                )
            prompts.append({name: inputs[name][index : index + 1, :tiles] for name in names} if tiles else {})
        return prompts
