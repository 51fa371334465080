"""The training parts of Mllama: packed rows of several images, frozen parts, and floating-point operations.

In transformers the cross attention lets the tokens before a sample's image see every tile, and only the MLP after it is
masked. A sample without an image skips the cross-attention layers. If samples share a row, the model can do neither by
itself. ``cross_rows`` tells the layers what to do, with one entry per token.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor, nn
from transformers import MllamaConfig, PreTrainedModel
from transformers.models.mllama.processing_mllama import get_cross_attention_token_mask

from llava_cot.families.training import Example, Training, times_multiplied


@dataclass(frozen=True)
class Image:
    pixels: Tensor  # float32 [max_tiles, 3, height, width]
    tiles: int
    aspect_ratio_id: int


class MllamaTraining(Training):
    """Packs rows so that a token sees only the images of its own sequence.

    In transformers a token before the images of its sequence sees all tiles of the row; here it sees those of its own
    sequence. A sequence without an image passes through the cross-attention layers unchanged.
    """

    def __init__(self, config: MllamaConfig) -> None:
        self.config = config

    @property
    def parts(self) -> dict[str, str]:
        cross = rf"layers\.({'|'.join(map(str, self.config.text_config.cross_attention_layers))})\."
        return {
            "vision": r"model\.vision_model\.",
            "projector": r"model\.multi_modal_projector\.",
            "cross": rf"model\.language_model\.{cross}",
            "language": rf"(model\.language_model\.(?!{cross})|lm_head\.|head\.)",
        }

    def prepare(self, model: PreTrainedModel) -> None:
        """Make the cross-attention layers obey ``cross_rows``, a keyword argument of ``model.model(...)``.

        ``cross_rows`` is float [batch, tokens, 2] of zeros and ones, as ``pack`` makes it. The outputs of the layer's
        attention and of its MLP are multiplied by its two columns before they are added to the token. A call without
        ``cross_rows`` works as before. The hooks keep no state, so a layer may be wrapped, sharded, or computed twice.
        """
        for index in self.config.text_config.cross_attention_layers:
            layer = model.model.language_model.layers[index]
            layer.register_forward_pre_hook(_mask_mlp, with_kwargs=True)
            layer.cross_attn.register_forward_hook(_mask_attention, with_kwargs=True)

    def read_image(self, processor: Any, image: PIL.Image.Image) -> Image:
        made = processor.image_processor(images=[[image]], return_tensors="pt")
        tiles = int(np.asarray(made["num_tiles"]).item())
        return Image(made["pixel_values"][0, 0], tiles, int(made["aspect_ratio_ids"].item()))

    def pack(
        self,
        processor: Any,
        rows: Sequence[Sequence[Example]],
        images: Mapping[str, Image],
        text: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        tokens = text["input_ids"].shape[1]
        layouts = [_lay_out(row) for row in rows]
        slots, max_tiles = max(1, *map(len, layouts)), processor.image_processor.max_image_tiles
        # uint8, because transformers repeats it for every image token in its own dtype.
        cross_mask = torch.zeros(len(rows), tokens, slots, max_tiles, dtype=torch.uint8)
        cross_rows = torch.zeros(len(rows), tokens, 2)
        for index, (row, places) in enumerate(zip(rows, layouts)):
            start = 0
            for example in row:
                own = slice(start, start + len(example.input_ids))
                spans = get_cross_attention_token_mask(example.input_ids, processor.image_token_id)
                _look(example, spans, places, images, cross_mask[index, own], cross_rows[index, own])
                start = own.stop
        vision = _place(layouts, images, slots, max_tiles, processor.image_processor.size)
        return {**text, **vision, "cross_attention_mask": cross_mask, "cross_rows": cross_rows}

    def full_images(self, text: dict[str, Tensor], *, images_per_row: int) -> dict[str, Tensor]:
        vision, (rows, row_tokens) = self.config.vision_config, text["input_ids"].shape
        tiles, size = vision.max_num_tiles, vision.image_size
        return {
            **text,
            "pixel_values": torch.zeros(rows, images_per_row, tiles, vision.num_channels, size, size),
            "aspect_ratio_ids": torch.ones(rows, images_per_row, dtype=torch.int64),
            "aspect_ratio_mask": torch.ones(rows, images_per_row, tiles, dtype=torch.int64),
            "cross_attention_mask": torch.ones(rows, row_tokens, images_per_row, tiles, dtype=torch.uint8),
            "cross_rows": torch.ones(rows, row_tokens, 2),
        }

    def count_images(self, inputs: dict[str, Tensor]) -> dict[str, Any]:
        has_images = bool(inputs["cross_rows"][..., 0].any())
        return {"num_images": int((inputs["aspect_ratio_ids"] > 0).sum()) if has_images else 0}

    def flops(
        self,
        *,
        num_tokens: int,
        num_images: int,
        grids: Tensor | None = None,
        num_supervised: int | None = None,
        num_pairs: int | None = None,
        num_cross_pairs: int | None = None,
        freeze: Collection[str] = (),
        adapters_only: bool = False,
    ) -> float:
        """Count two FLOPs for each multiply-add. Mllama computes every image with ``max_num_tiles`` tiles.

        ``num_cross_pairs`` are the pairs of a token and an image key that it sees in a cross-attention layer. By
        default every token sees one image, if there is one.

        Let h be the hidden size, f the FFN size, q and k the widths of all query and of all key heads, T the tokens, S
        the supervised tokens, and I the images of K = max_num_tiles * (patches + 1) keys, one per vision token. The
        forward takes the following, times two:

            self-attention layer    T (2 h q + 2 h k + 3 h f) + 2 q num_pairs
            cross-attention layer   T (2 h q + 3 h f) + I K (2 h k) + 2 q num_cross_pairs
            head                    S h vocab_size
            projector               I K vision_output_dim h
            vision layer            I (N (4 v v + 2 v g) + 2 v N N), v and g its sizes, N = K with tiles padded to 8
            patch embedding         I max_num_tiles patches (channels patch_size^2) v

        The backward takes as much again for the gradients of inputs, and as much for those of weights, if there are
        any. The backward of attention takes twice its forward.
        """
        text, vision = self.config.text_config, self.config.vision_config
        patches = (vision.image_size // vision.patch_size) ** 2
        keys = vision.max_num_tiles * (patches + 1)
        padded = vision.max_num_tiles * -(-(patches + 1) // 8) * 8
        num_supervised = num_tokens if num_supervised is None else num_supervised
        num_pairs = num_tokens**2 // max(num_images, 1) if num_pairs is None else num_pairs
        num_cross_pairs = (num_tokens * keys if num_images else 0) if num_cross_pairs is None else num_cross_pairs
        passes = partial(times_multiplied, freeze=freeze, adapters_only=adapters_only)
        hidden, head_dim = text.hidden_size, text.hidden_size // text.num_attention_heads
        queries, key_width = text.num_attention_heads * head_dim, text.num_key_value_heads * head_dim
        ffn = 3 * hidden * text.intermediate_size
        num_cross = len(text.cross_attention_layers)
        num_self = text.num_hidden_layers - num_cross
        has_vision_gradient = "vision" not in freeze or adapters_only
        has_key_gradient = has_vision_gradient or "projector" not in freeze

        total = passes("language", below=True) * num_self * num_tokens * (2 * hidden * (queries + key_width) + ffn)
        total += 3 * num_self * 2 * queries * num_pairs
        total += passes("language", below=True) * num_supervised * hidden * text.vocab_size
        if num_images:
            total += passes("cross", below=True) * num_cross * num_tokens * (2 * hidden * queries + ffn)
            total += passes("cross", below=has_key_gradient) * num_cross * num_images * keys * 2 * hidden * key_width
            total += 3 * num_cross * 2 * queries * num_cross_pairs
        total += passes("projector", below=has_vision_gradient) * num_images * keys * vision.vision_output_dim * hidden
        width, layers = vision.hidden_size, vision.num_hidden_layers + vision.num_global_layers
        weights = (
            passes("vision", below="vision" not in freeze) * padded * width * (4 * width + 2 * vision.intermediate_size)
        )
        attention = (3 if has_vision_gradient else 1) * 2 * width * padded**2
        embedding = (1 + (has_vision_gradient and not adapters_only)) * vision.max_num_tiles * patches
        embedding *= vision.num_channels * vision.patch_size**2 * width
        total += num_images * (layers * (weights + attention) + embedding)
        return 2.0 * total


def _mask_mlp(layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    rows = kwargs.get("cross_rows")
    if rows is None:
        return None
    hidden = args[0] if args else kwargs["hidden_states"]
    mask = rows[:, None, :, 1:].to(hidden.dtype)  # [batch, 1, tokens, 1], as in transformers
    return args, {**kwargs, "full_text_row_masked_out_mask": mask}


def _mask_attention(attention: nn.Module, args: tuple, kwargs: dict, output: tuple[Tensor, ...]) -> tuple | None:
    rows = kwargs.get("cross_rows")  # the layer passes its keyword arguments on
    if rows is None:
        return None
    return output[0] * rows[..., :1].to(output[0].dtype), *output[1:]


def _look(
    example: Example,
    spans: Sequence[tuple[int, int]],
    places: Mapping[Any, int],
    images: Mapping[str, Image],
    mask: Tensor,
    rows: Tensor,
) -> None:
    """Fill in what the tokens of one example see: ``mask`` [tokens, images, tiles] and ``rows`` [tokens, 2].

    Each of ``spans`` is the first token that sees an image, and the first token after it that doesn't, or -1.
    """
    if len(spans) != len(example.images):
        raise ValueError(
            f"input_ids must have an image token for each of images={example.images}, got {len(spans)} image tokens"
        )
    if not example.images:
        return
    own = [places[key] for key in _numbered(example.images)]
    for (first, last), path, slot in zip(spans, example.images, own):
        mask[first : None if last == -1 else last, slot, : images[path].tiles] = 1
    sees = mask.flatten(1).any(1).bool()  # any() of uint8 is uint8
    rows[:, 0] = 1
    rows[:, 1] = sees
    for slot in own:
        mask[~sees, slot] = 1  # padding tiles too, as in transformers


def _place(
    layouts: Sequence[Mapping[Any, int]], images: Mapping[str, Image], slots: int, max_tiles: int, size: Any
) -> dict[str, Tensor]:
    """Return the vision inputs. Missing images are zeros with aspect ratio id 0, as the processor pads."""
    pixels = torch.zeros(len(layouts), slots, max_tiles, 3, size["height"], size["width"])
    ids = torch.zeros(len(layouts), slots, dtype=torch.int64)
    mask = torch.zeros(len(layouts), slots, max_tiles, dtype=torch.int64)
    mask[..., 0] = 1
    if not images:
        ids[0, 0] = 1  # the dummy image
    for index, places in enumerate(layouts):
        for (path, _), slot in places.items():
            image = images[path]
            pixels[index, slot] = image.pixels
            ids[index, slot] = image.aspect_ratio_id
            mask[index, slot, : image.tiles] = 1
    return {"pixel_values": pixels, "aspect_ratio_ids": ids, "aspect_ratio_mask": mask}


def _numbered(paths: Sequence[str]) -> list[tuple[str, int]]:
    """Pair each path with how often it came before, since an example that shows an image twice attends to two."""
    return [(path, paths[:at].count(path)) for at, path in enumerate(paths)]


def _lay_out(row: Sequence[Example]) -> dict[Any, int]:
    """Return the slots of a row's images. A file that several of its examples show has one slot."""
    places: dict[Any, int] = {}
    for example in row:
        for key in _numbered(example.images):
            places.setdefault(key, len(places))
    return places
