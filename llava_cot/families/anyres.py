"""Families that see an image whole and in tiles, as many as its shape asks for ("any resolution").

LLaVA-NeXT (Liu et al., 2023, arXiv:2310.03744) and LLaVA-OneVision (Li et al., 2024, arXiv:2408.03326).
"""

import math
from typing import ClassVar

import torch
from transformers.models.llava_next.modeling_llava_next import (
    get_anyres_image_grid_shape,
    image_size_to_num_patches,
    unpad_image,
)

from llava_cot.families.family import Family, Inputs, Prompt


class LlavaNext(Family):
    """``image_sizes`` has the height and width of each image in pixels, as it was before it was scaled.

    ``pixel_values`` has the whole image and then its tiles, padded to the image of the batch that has the most. Each
    row of patches of the tiles ends with a token that stands for no patch. The padding of an image has no tokens.
    """

    inputs: ClassVar[Inputs] = {
        "input_ids": ("batch", "tokens"),
        "attention_mask": ("batch", "tokens"),
        "pixel_values": ("images", "tiles", "channels", "height", "width"),
        "image_sizes": ("images", "sides"),
    }

    @property
    def sizes(self) -> dict[str, int]:
        return {"sides": 2}

    def split_images(self, inputs: Prompt, keep: torch.Tensor) -> list[Prompt]:
        prompts = super().split_images(inputs, keep)
        for prompt in filter(None, prompts):
            prompt["pixel_values"] = prompt["pixel_values"][:, : max(map(self._tiles, prompt["image_sizes"].tolist()))]
        return prompts

    def image_sizes(self, inputs: Prompt, image_tokens: int) -> list[tuple[int, int]]:
        return [(1, self._tokens(size)) for size in inputs["image_sizes"].tolist()]

    @property
    def _side(self) -> int:
        """The patches of a side of a tile."""
        return self.config.vision_config.image_size // self.config.vision_config.patch_size

    def _tiles(self, size: list[int]) -> int:
        """Return the tiles of an image of this height and width, and one for the whole image."""
        return image_size_to_num_patches(size, self.config.image_grid_pinpoints, self.config.vision_config.image_size)

    def _tokens(self, size: list[int]) -> int:
        height, width = self._rows_and_columns(size)
        return self._side**2 + height * (width + 1)

    def _rows_and_columns(self, size: list[int]) -> tuple[int, int]:
        """Return the rows and columns of patches that the tiles have without the padding."""
        rows, columns = get_anyres_image_grid_shape(
            size, self.config.image_grid_pinpoints, self.config.vision_config.image_size
        )
        padded = torch.empty(1, rows * self._side, columns * self._side, device="meta")
        height, width = unpad_image(padded, size).shape[1:]
        return height, width


class LlavaOnevision(LlavaNext):
    """``batch_num_images`` has the number of images of each prompt. Several are seen whole only, a single one in tiles.

    Without it every image is a single one.
    """

    inputs: ClassVar[Inputs] = {**LlavaNext.inputs, "batch_num_images": ("prompts",)}
    optional = frozenset({"attention_mask", "batch_num_images"})

    def split_images(self, inputs: Prompt, keep: torch.Tensor) -> list[Prompt]:
        prompts = super().split_images(inputs, keep)
        given = inputs.get("batch_num_images")
        if given is None:
            return prompts
        numbers = iter(number for number in given.tolist() if number)
        for index, prompt in enumerate(prompts):
            images, own = len(prompt.get("image_sizes", ())), list[int]()
            while sum(own) < images:  # a processor that is given a flat list of images takes each for a single one
                own.append(next(numbers))
            if sum(own) != images:
                raise ValueError(f"batch_num_images must have the images of input_ids[{index}]={images}, got {own}")
            if images:
                prompt["batch_num_images"] = given.new_tensor(own)
            if images and min(own) > 1:
                prompt["pixel_values"] = prompt["pixel_values"][:, :1]
        return prompts

    def image_sizes(self, inputs: Prompt, image_tokens: int) -> list[tuple[int, int]]:
        sizes, numbers = inputs["image_sizes"].tolist(), inputs.get("batch_num_images")
        if numbers is None:
            return [(1, self._tokens(size)) for size in sizes]
        if int(numbers.sum()) != len(sizes):
            raise ValueError(
                f"batch_num_images must have the images of image_sizes={len(sizes)}, got {numbers.tolist()}"
            )
        is_single = [number == 1 for number in numbers.tolist() for _ in range(number)]
        return [(1, self._tokens(size) if single else self._side**2 + 1) for size, single in zip(sizes, is_single)]

    def _rows_and_columns(self, size: list[int]) -> tuple[int, int]:
        height, width = super()._rows_and_columns(size)
        most = int(self.config.vision_aspect_ratio.removeprefix("anyres_max_"))
        ratio = math.sqrt(height * width / (most * self._side**2))
        return (int(height // ratio), int(width // ratio)) if ratio > 1.1 else (height, width)
