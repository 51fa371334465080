"""Mllama (Llama 3.2 Vision; Grattafiori et al., 2024, arXiv:2407.21783): some layers attend to the image alone."""

from typing import ClassVar

import torch

from llava_cot.families.family import Family, Inputs, Prompt
from llava_cot.families.mllama_training import MllamaTraining
from llava_cot.stages import LLAVA_COT


class Mllama(Family):
    """An image has up to ``max_num_tiles`` tiles, each with one token per patch and one more.

    The keys and values of those tokens in the cross-attention layers go to the image store.
    """

    inputs: ClassVar[Inputs] = {
        "input_ids": ("batch", "tokens"),
        "attention_mask": ("batch", "tokens"),
        "pixel_values": ("batch", "images", "tiles", "channels", "height", "width"),
        "aspect_ratio_ids": ("batch", "images"),
        "aspect_ratio_mask": ("batch", "images", "tiles"),
        "cross_attention_mask": ("batch", "tokens", "images", "tiles"),
    }
    may_end_early = frozenset({"cross_attention_mask"})
    has_custom_generate = True
    grammar = LLAVA_COT  # the paper's own model
    training = MllamaTraining

    @property
    def sizes(self) -> dict[str, int]:
        vision = self.config.vision_config
        return {"tiles": vision.max_num_tiles, "height": vision.image_size, "width": vision.image_size}

    @property
    def cross_layers(self) -> tuple[int, ...]:
        return tuple(sorted(set(self.config.text_config.cross_attention_layers)))

    def largest_image(self, prompt_tokens: int) -> tuple[int, int]:
        tokens = self.config.vision_config.max_num_tiles * self._tile_tokens
        return tokens, tokens

    @property
    def _tile_tokens(self) -> int:
        vision = self.config.vision_config
        return (vision.image_size // vision.patch_size) ** 2 + 1

    def split_images(self, inputs: Prompt, keep: torch.Tensor) -> list[Prompt]:
        names = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
        ids, most = inputs["aspect_ratio_ids"], len(self.config.vision_config.supported_aspect_ratios)
        if ids.min() < 0 or ids.max() > most:
            raise ValueError(f"aspect_ratio_ids must be in [0, {most}], got {ids.flatten().tolist()}")
        cross_mask = inputs["cross_attention_mask"]
        missing = keep.shape[1] - cross_mask.shape[1]
        if missing > 0:  # tokens after those that the processor saw see what the last of those saw
            cross_mask = torch.cat([cross_mask, cross_mask[:, -1:].expand(-1, missing, -1, -1)], dim=1)
        prompts = list[Prompt]()
        for index, kept in enumerate(keep):
            has_image = (inputs["input_ids"][index, kept] == self.config.image_token_id).any()
            if not has_image and not cross_mask[index, kept].any():
                prompts.append({})
                continue
            prompt = {name: inputs[name][index : index + 1] for name in names if inputs.get(name) is not None}
            prompt["cross_attention_mask"] = cross_mask[index, kept].unsqueeze(0)
            if not prompt["cross_attention_mask"][0, -1].any():
                raise ValueError(
                    f"input_ids[{index}] must contain the image token, so that its last token sees an image"
                )
            prompts.append(prompt)
        return prompts

    def stored_image_tokens(self, prompt: Prompt) -> torch.Tensor:
        """Return the image tokens that the last token of a prompt sees, as bool [images * tiles * tokens of a tile].

        Every later token sees the same ones.
        """
        if "cross_attention_mask" not in prompt:
            return torch.zeros(0, dtype=torch.bool)
        tiles = prompt["cross_attention_mask"][0, -1].flatten().bool()
        return tiles.repeat_interleave(self._tile_tokens)

    def blind_inputs(self, image_group: torch.Tensor) -> Prompt:
        """Return a mask in which a token sees one tile or none.

        The model makes the mask of its MLPs from it. It leaves out as many tokens at the start as its cache has, which
        says 1. The mask of the attention itself is not read.
        """
        sees = (image_group >= 0).long()
        return {"cross_attention_mask": torch.cat([sees[:1], sees]).view(1, -1, 1, 1)}
