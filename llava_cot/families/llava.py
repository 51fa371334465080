"""LLaVA (Liu et al., 2023, arXiv:2304.08485): the vision encoder decides what an image is made of."""

from typing import Any

from llava_cot.families.family import Family
from llava_cot.families.pixtral import Pixtral
from llava_cot.families.tiles import Tiles


class Llava(Tiles):
    """An image is one tile, or has any size if the vision encoder is Pixtral's."""

    @classmethod
    def of(cls, config: Any) -> Family:
        return Pixtral(config) if config.vision_config.model_type == "pixtral" else cls(config)
