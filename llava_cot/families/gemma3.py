"""Gemma 3 (Gemma Team, 2025, arXiv:2503.19786): the tokens of one image attend to each other in both directions."""

from typing import ClassVar

import torch
from torch.nn.functional import pad

from llava_cot.families.family import Family, Inputs, Prompt


class Gemma3(Family):
    """Every image has ``mm_tokens_per_image`` tokens, and so has every crop that pan and scan adds to the images.

    Most layers attend to a sliding window. Of the tokens of an image, a layer sees those within the window and all that
    come later in the same image. This holds for the prompt alone: what is decoded is text.
    """

    inputs: ClassVar[Inputs] = {
        "input_ids": ("batch", "tokens"),
        "attention_mask": ("batch", "tokens"),
        "pixel_values": ("images", "channels", "height", "width"),
        "token_type_ids": ("batch", "tokens"),
    }
    optional = frozenset({"attention_mask", "token_type_ids"})

    def split_images(self, inputs: Prompt, keep: torch.Tensor) -> list[Prompt]:
        kinds, is_image = inputs.get("token_type_ids"), inputs["input_ids"] == self.config.image_token_id
        if kinds is not None and ((kinds == 1) != is_image)[keep].any():
            raise ValueError(f"token_type_ids must be 1 at image tokens and 0 elsewhere, got {kinds.tolist()}")
        return super().split_images(inputs, keep)

    def image_sizes(self, inputs: Prompt, image_tokens: int) -> list[tuple[int, int]]:
        return [(1, self.config.mm_tokens_per_image)] * len(inputs["pixel_values"])

    def prefill_mask(self, inputs: Prompt, window: int) -> torch.Tensor | None:
        if "pixel_values" not in inputs:
            return None
        is_image = inputs["input_ids"] == self.config.image_token_id  # [B, T]
        begins = is_image & ~pad(is_image, (1, 0))[:, :-1]
        image = torch.where(is_image, begins.cumsum(1), 0)
        place = torch.arange(is_image.shape[1], device=is_image.device)
        seen = place <= place[:, None]  # [T, T]
        seen = seen | ((image[:, :, None] == image[:, None]) & is_image[:, None])  # [B, T, T]
        if window:
            seen &= place > place[:, None] - window
        return seen[:, None]
