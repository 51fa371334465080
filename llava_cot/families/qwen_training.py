"""The training parts of Qwen2.5-VL and Qwen3-VL: packed rows with M-RoPE, frozen parts, and FLOPs.

The images of an example are tokens of its text, so a token sees no image of another sequence, and no mask is needed.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import PIL.Image
import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from llava_cot.families.training import Example, Training, times_multiplied
from llava_cot.image import image_size


@dataclass(frozen=True)
class Image:
    pixels: Tensor  # float32 [patches, values]
    grid: Tensor  # int64 [3]: time, height and width in patches


class QwenTraining(Training):
    """Gives each example of a row the rotary positions (M-RoPE) that transformers gives it alone.

    ``position_ids`` are int64 [4, batch, tokens]. The first of the four counts the tokens of an example, and tells
    transformers where a new sequence begins. The others are the time, height and width of the rotary positions.
    """

    dummy_tokens = 1
    reads_values = True  # the sizes of the images

    def __init__(self, config: PreTrainedConfig) -> None:
        self.config = config

    @property
    def parts(self) -> dict[str, str]:
        merger = r"model\.visual\.(merger|deepstack_merger_list)\."
        return {
            "vision": rf"(?!{merger})model\.visual\.",
            "projector": merger,
            "language": r"(model\.language_model|lm_head)\.",
        }

    def prepare(self, model: PreTrainedModel) -> None:
        """Do nothing, since transformers' own model takes packed rows."""

    def image_tokens(self, processor: Any, path: str) -> int:
        width, height = image_size(path)
        patches = processor.image_processor.get_number_of_image_patches(height, width)
        return patches // self.config.vision_config.spatial_merge_size**2

    def read_image(self, processor: Any, image: PIL.Image.Image) -> Image:
        made = processor.image_processor(images=[image], return_tensors="pt")
        return Image(made["pixel_values"], made["image_grid_thw"][0])

    def pack(
        self,
        processor: Any,
        rows: Sequence[Sequence[Example]],
        images: Mapping[str, Image],
        text: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        input_ids, position_ids = text["input_ids"], text["position_ids"].expand(4, -1, -1).clone()
        shown = [images[path] for row in rows for example in row for path in example.images]
        for index, row in enumerate(rows):
            start = 0
            for example in row:
                own = slice(start, start + len(example.input_ids))
                grids = [images[path].grid for path in example.images]
                position_ids[1:, index, own] = self.rotary_positions(input_ids[index, own], grids)
                start = own.stop
        if not shown:
            merge, values = self.config.vision_config.spatial_merge_size, self._patch_values
            shown = [Image(torch.zeros(merge**2, values), torch.tensor([1, merge, merge]))]
            input_ids = input_ids.clone()
            input_ids[0, -1] = self.config.image_token_id  # padding, which is a sequence of its own
        return {
            "input_ids": input_ids,
            "position_ids": position_ids,
            "pixel_values": torch.cat([image.pixels for image in shown]),
            "image_grid_thw": torch.stack([image.grid for image in shown]),
        }

    def rotary_positions(self, input_ids: Tensor, grids: Sequence[Tensor]) -> Tensor:
        """Return the time, height and width of the tokens of one example, int64 [3, T].

        Text advances all three by one a token. The tokens of an image have the time of its first one, and their places
        in its grid as height and width. An image advances by its longer side.

        Raises:
            ValueError: ``input_ids`` [T] don't have the image tokens of ``grids``.
        """
        merge = self.config.vision_config.spatial_merge_size
        sizes = [(int(height) // merge, int(width) // merge) for _, height, width in grids]
        places = (input_ids == self.config.image_token_id).nonzero().flatten().tolist()
        if len(places) != (needed := sum(height * width for height, width in sizes)):
            raise ValueError(f"input_ids must have {needed} image tokens for the images' sizes, got {len(places)}")
        parts, at, position, first = list[Tensor](), 0, 0, 0
        for height, width in sizes:
            before = places[first] - at
            parts.append(torch.arange(position, position + before).expand(3, -1))
            position += before
            along = torch.zeros(height, width, dtype=torch.int64)
            grid = torch.stack([along, along + torch.arange(height)[:, None], along + torch.arange(width)])
            parts.append(position + grid.flatten(1))
            position += max(height, width)
            first += height * width
            at = places[first - 1] + 1
        parts.append(torch.arange(position, position + len(input_ids) - at).expand(3, -1))
        return torch.cat(parts, dim=1)

    @property
    def _patch_values(self) -> int:
        vision = self.config.vision_config
        return vision.in_channels * vision.temporal_patch_size * vision.patch_size**2

    def full_images(self, text: dict[str, Tensor], *, images_per_row: int) -> dict[str, Tensor]:
        """Return ``text`` with ``images_per_row`` images of equal size, as large as the rows allow."""
        (rows, row_tokens), merge = text["input_ids"].shape, self.config.vision_config.spatial_merge_size
        share = row_tokens // images_per_row
        if share < 3:
            raise ValueError(f"row_tokens must be >= 3 an image, got {row_tokens} for {images_per_row} images")
        height = math.isqrt(share - 2)  # an image stands between two tokens of its own
        width = (share - 2) // height
        place = torch.arange(row_tokens)
        is_image = (place < share * images_per_row) & ((place % share - 1) % share < height * width)
        grid = torch.tensor([1, height * merge, width * merge])
        patches = rows * images_per_row * height * width * merge**2
        return {
            "input_ids": torch.where(is_image, self.config.image_token_id, text["input_ids"]),
            "position_ids": text["position_ids"].expand(4, -1, -1),
            "pixel_values": torch.zeros(patches, self._patch_values),
            "image_grid_thw": grid.repeat(rows * images_per_row, 1),
        }

    def count_images(self, inputs: dict[str, Tensor]) -> dict[str, Any]:
        grids, is_image = inputs["image_grid_thw"], inputs["input_ids"] == self.config.image_token_id
        if is_image.sum() == 1 and is_image[0, -1] and inputs["position_ids"][0, 0, -1] == 0:
            grids = grids[:0]  # the dummy image, which is padding
        return {"num_images": len(grids), "grids": grids}

    def flops(
        self,
        *,
        num_tokens: int,
        num_images: int,
        grids: Tensor | None = None,
        num_supervised: int | None = None,
        num_pairs: int | None = None,
        freeze: Collection[str] = (),
        adapters_only: bool = False,
    ) -> float:
        """Count two FLOPs for each multiply-add. ``grids`` must be given if there are images.

        Let h be the hidden size, f the FFN size, q and k the widths of all query and of all key heads, T the tokens,
        and S the supervised tokens. Let v and g be the sizes of the vision layers, P the patches of an image, m^2 to a
        token, and A the pairs of them that see each other: P^2, or the sum over the windows of a layer with windows.
        The forward takes the following, times two:

            text layer       T (2 h q + 2 h k + 3 h f) + 2 q num_pairs
            head             S h vocab_size
            merger           P / m^2 (v m^2 v m^2 + v m^2 h), and again for each deepstack layer
            vision layer     P (4 v v + 2 v g, or 3 v g if gated) + 2 v A
            patch embedding  P (values of a patch) v

        The backward takes as much again for the gradients of inputs, and as much for those of weights, if there are
        any. The backward of attention takes twice its forward.
        """
        if num_images and (grids is None or len(grids) != num_images):
            raise ValueError(f"grids must be those of num_images={num_images} images, got {grids}")
        passes = partial(times_multiplied, freeze=freeze, adapters_only=adapters_only)
        text, has_vision_gradient = self.config.get_text_config(), "vision" not in freeze or adapters_only
        num_supervised = num_tokens if num_supervised is None else num_supervised
        num_pairs = num_tokens**2 // max(num_images, 1) if num_pairs is None else num_pairs
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        queries, keys = text.num_attention_heads * head_dim, text.num_key_value_heads * head_dim
        weights = 2 * text.hidden_size * (queries + keys) + 3 * text.hidden_size * text.intermediate_size
        total = passes("language", below=True) * text.num_hidden_layers * num_tokens * weights
        total += 3 * text.num_hidden_layers * 2 * queries * num_pairs
        total += passes("language", below=True) * num_supervised * text.hidden_size * text.vocab_size
        for grid in [] if grids is None else grids.tolist():
            merger, layers, attention, embedding = self._image_products(grid)
            total += passes("projector", below=has_vision_gradient) * merger
            total += passes("vision", below="vision" not in freeze) * layers
            total += (3 if has_vision_gradient else 1) * attention
            total += (1 + (has_vision_gradient and not adapters_only)) * embedding
        return 2.0 * total

    def _image_products(self, grid: Sequence[int]) -> tuple[int, int, int, int]:
        """Return the multiply-adds of an image's forward: mergers, vision layers, their attention, patch embedding."""
        vision = self.config.vision_config
        width, merge, (time, *sides) = vision.hidden_size, vision.spatial_merge_size, grid
        patches = time * sides[0] * sides[1]
        windowed = vision.depth - len(getattr(vision, "fullatt_block_indexes", range(vision.depth)))
        pairs = (vision.depth - windowed) * patches**2 // time
        if windowed:
            window = vision.window_size // vision.patch_size
            squares = [side // window * window**2 + (side % window) ** 2 for side in sides]
            pairs += windowed * time * squares[0] * squares[1]
        merged, mergers = width * merge**2, 1 + len(getattr(vision, "deepstack_visual_indexes", ()))
        ffn = (2 if hasattr(vision, "deepstack_visual_indexes") else 3) * width * vision.intermediate_size
        return (
            mergers * patches // merge**2 * merged * (merged + vision.out_hidden_size),
            vision.depth * patches * (4 * width**2 + ffn),
            2 * width * pairs,
            patches * self._patch_values * width,
        )
