"""Families whose images have any size and whose rotary positions have three parts (M-RoPE).

Qwen2-VL (Wang et al., 2024, arXiv:2409.12191), Qwen2.5-VL (Bai et al., 2025, arXiv:2502.13923), Qwen3-VL (Bai et al.,
2025, arXiv:2511.21631) and GLM-4.1V, 4.5V and 4.6V (GLM-V team, 2025, arXiv:2507.01006), also with mixtures of experts.
"""

from typing import ClassVar

import torch
from transformers import PreTrainedModel

from llava_cot.families.family import Family, Inputs, Prompt
from llava_cot.families.qwen_training import QwenTraining


class QwenVL(Family):
    """``image_grid_thw`` is an image's time, height and width in patches.

    A token stands for ``spatial_merge_size`` squared patches. An image advances the rotary positions by its longer side
    in tokens.
    """

    inputs: ClassVar[Inputs] = {
        "input_ids": ("batch", "tokens"),
        "attention_mask": ("batch", "tokens"),
        "pixel_values": ("patches", "values"),
        "image_grid_thw": ("images", "thw"),
        "mm_token_type_ids": ("batch", "tokens"),
    }
    optional = frozenset({"attention_mask", "mm_token_type_ids"})

    def largest_image(self, prompt_tokens: int) -> tuple[int, int]:
        return prompt_tokens * self.config.vision_config.spatial_merge_size**2, 0  # an image may fill the prompt

    def image_sizes(self, inputs: Prompt, image_tokens: int) -> list[tuple[int, int]]:
        patches = inputs["image_grid_thw"].prod(-1).tolist()
        if sum(patches) != (got := len(inputs["pixel_values"])):
            raise ValueError(f"pixel_values must have image_grid_thw's patches={sum(patches)} rows, got {got}")
        return [(count, count // self.config.vision_config.spatial_merge_size**2) for count in patches]

    def positions(
        self, model: PreTrainedModel, inputs: Prompt, lengths: torch.Tensor
    ) -> tuple[torch.Tensor, list[int]]:
        ids = inputs["input_ids"]
        is_image = (ids == self.config.image_token_id).int()
        is_token = torch.arange(ids.shape[1], device=ids.device) < lengths.unsqueeze(1)
        positions, deltas = model.model.get_rope_index(
            ids, is_image, image_grid_thw=inputs.get("image_grid_thw"), attention_mask=is_token.int()
        )
        return positions, deltas.flatten().tolist()


class Qwen2_5_VL(QwenVL):
    """Qwen2.5-VL and Qwen3-VL, which can be trained too."""

    training = QwenTraining
