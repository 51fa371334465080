"""The interface of a model family to the engine and the generator."""

from typing import Any, ClassVar

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from llava_cot.families.training import Training
from llava_cot.stages import Grammar

Prompt = dict[str, torch.Tensor]  # the processor's inputs for one prompt, without padding
Inputs = dict[str, tuple[str, ...]]  # the dimensions of each input


class Family:
    """A model family, bound to the config of one of its models.

    The defaults are right for a family whose images are tokens of the prompt and whose rotary positions count them like
    any other token. Such a subclass only sets ``inputs`` and ``optional``.

    Attributes:
        inputs: the inputs that the family's processor makes, each with the names of its dimensions. ``batch`` means one
            row per prompt. Without it the entries of all prompts follow each other in the order of their image tokens,
            one per image (``images``) or one per piece of ``pixel_values`` (``patches``).
        optional: the inputs that a caller may leave out.
        may_end_early: the inputs that may have fewer tokens than ``input_ids``.
        has_custom_generate: whether transformers' ``generate`` hands these inputs to a custom function unchanged.
        pixel_values_per_pass: the most elements of ``pixel_values`` in one prefill of several prompts, by device type.
            They bound the memory of the vision encoder. An image of 1120 x 1120 has 3.8 million.
        grammar: the stages that its models write, where that is known.
        training: the training parts; None if models of this family can't be trained.
    """

    inputs: ClassVar[Inputs]
    optional: ClassVar[frozenset[str]] = frozenset({"attention_mask"})
    may_end_early: ClassVar[frozenset[str]] = frozenset()
    has_custom_generate: ClassVar[bool] = False
    pixel_values_per_pass: ClassVar[dict[str, int]] = {"cpu": 4 << 20, "cuda": 40 << 20}
    grammar: ClassVar[Grammar | None] = None
    training: ClassVar[type[Training] | None] = None

    def __init__(self, config: Any) -> None:
        self.config = config

    @classmethod
    def of(cls, config: Any) -> "Family":
        """Return the object of the model with this transformers config."""
        return cls(config)

    @property
    def sizes(self) -> dict[str, int]:
        """The dimensions of ``inputs`` whose size the config tells."""
        return {}

    @property
    def cross_layers(self) -> tuple[int, ...]:
        """The indices of the decoder layers that attend to the image store instead of the text."""
        return ()

    def largest_image(self, prompt_tokens: int) -> tuple[int, int]:
        """Return the tokens of the largest image in a prompt: those in the vision encoder and those in the image store.

        By default every image has ``image_size`` x ``image_size`` pixels, and none is in the image store.
        """
        vision = self.config.vision_config
        return (vision.image_size // vision.patch_size) ** 2 + 1, 0

    def split_images(self, inputs: Prompt, keep: torch.Tensor) -> list[Prompt]:
        """Split the image inputs of a padded batch into those of its prompts. A prompt without an image has none.

        Args:
            inputs: the processor's batch, with every input that is not optional.
            keep: bool [batch, tokens], False for padding.

        Raises:
            ValueError: the images don't fit the prompts' image tokens.
        """
        counts = [int((ids[kept] == self.config.image_token_id).sum()) for ids, kept in zip(inputs["input_ids"], keep)]
        sizes = self.image_sizes(inputs, sum(counts))
        prompts, first, start = list[Prompt](), 0, 0
        for index, count in enumerate(counts):
            if not count:
                prompts.append({})
                continue
            last, end, tokens = first, start, 0
            while last < len(sizes) and tokens < count:
                end, tokens = end + sizes[last][0], tokens + sizes[last][1]
                last += 1
            if tokens != count:
                raise ValueError(f"input_ids[{index}] must have its images' tokens={tokens}, got {count} image tokens")
            own = {"images": slice(first, last), "patches": slice(start, end)}
            prompts.append({name: inputs[name][own[dims[0]]] for name, dims in self.inputs.items() if dims[0] in own})
            first, start = last, end
        if first != len(sizes):
            raise ValueError(f"pixel_values must have the images of input_ids={first}, got {len(sizes)}")
        return prompts

    def image_sizes(self, inputs: Prompt, image_tokens: int) -> list[tuple[int, int]]:
        """Return the patches and the tokens of each image of a batch whose prompts have ``image_tokens`` tokens in all.

        By default each entry of ``pixel_values`` is an image, and all images have the same number of tokens.
        """
        images = len(inputs["pixel_values"])
        return [(1, image_tokens // max(1, images))] * images

    def stack(self, prompts: list[Prompt]) -> Prompt:
        """Stack several prompts into one batch, padded on the right.

        No token attends to the padding, so there is no mask, but the padding must not look like an image. All prompts
        must have the same ``image_shape``.
        """
        is_image = getattr(self.config, "image_token_id", None) == 0
        stacked = {}
        for name in (name for name in prompts[0] if name != "attention_mask"):
            values = [prompt[name] for prompt in prompts]
            if "tokens" in self.inputs.get(name, ()):
                padding = int(is_image and name == "input_ids")
                rows = [value[0] for value in values]
                stacked[name] = pad_sequence(rows, batch_first=True, padding_value=padding)
            else:
                stacked[name] = torch.cat(values)
        return stacked

    def positions(
        self, model: PreTrainedModel, inputs: Prompt, lengths: torch.Tensor
    ) -> tuple[torch.Tensor, list[int]]:
        """Return the rotary positions of a batch of prompts, and for each prompt the offset of later tokens.

        The rotary position of a later token is its index plus that offset.

        Args:
            inputs: the batch that ``stack`` made.
            lengths: int64 [B], the number of tokens of each prompt without padding.

        Returns:
            The positions, int64 [B, T], or [3, B, T] for M-RoPE, and the offsets.
        """
        ids = inputs["input_ids"]
        return torch.arange(ids.shape[1], device=ids.device).expand_as(ids), [0] * len(ids)

    def prefill_mask(self, inputs: Prompt, window: int) -> torch.Tensor | None:
        """Return which keys the tokens of a batch of prompts see in the layers with one window, as bool [B, 1, T, T].

        None means causal attention within the window. A token must see itself, padding too.

        Args:
            inputs: the batch that ``stack`` made.
            window: how many keys a token sees, its own included; 0 means all.
        """
        return None

    def stored_image_tokens(self, prompt: Prompt) -> torch.Tensor:
        """Return which image tokens of the cross-attention layers must be kept for decoding, as bool [S]."""
        return torch.zeros(0, dtype=torch.bool)

    def image_tokens(self, prompt: Prompt) -> int:
        """Return how many tokens of the image store a prompt takes."""
        return int(self.stored_image_tokens(prompt).sum())

    def image_shape(self, prompt: Prompt) -> tuple[int, ...] | None:
        """Return what the images of prompts must have in common to be encoded in one pass; None without an image."""
        return tuple(prompt["pixel_values"].shape[1:]) if "pixel_values" in prompt else None

    def pixel_values(self, prompt: Prompt) -> int:
        """Return the number of ``pixel_values`` elements of a prompt, to compare with ``pixel_values_per_pass``."""
        return prompt["pixel_values"].numel() if "pixel_values" in prompt else 0

    def blind_inputs(self, image_group: torch.Tensor) -> Prompt:
        """Return what the model must be given beside T tokens, so that those of group -1 see no image.

        ``image_group`` is int32 [T]. Only a family with ``cross_layers`` is asked.
        """
        raise NotImplementedError
