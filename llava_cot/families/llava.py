"""LLaVA (Liu et al., 2023, arXiv:2304.08485): images have one size, and their tokens are part of the prompt."""

from typing import ClassVar

from llava_cot.families.family import Family, Inputs


class Llava(Family):
    model_type = "llava"
    inputs: ClassVar[Inputs] = {
        "input_ids": ("batch", "tokens"),
        "attention_mask": ("batch", "tokens"),
        "pixel_values": ("images", "channels", "height", "width"),
    }
