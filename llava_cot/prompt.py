"""Turn a question and its images into the inputs of a model, one sample at a time."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin

from llava_cot.chat import render
from llava_cot.core import Bos, check_kind
from llava_cot.families import Family, Prompt, family_of
from llava_cot.image import Images, images_of, open_image
from llava_cot.literal import marked, without_marks
from llava_cot.question import Question, check_question, messages_of


def build_inputs(
    processor: ProcessorMixin,
    image: Images,
    question: Question,
    bos: Bos,
    *,
    system: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    ask: Callable[[str], str] = lambda text: text,
) -> Prompt:
    """Return the processor's inputs for one question: chat template, generation prompt and one BOS.

    The images come before the question; there may be none. In a conversation they stand where its parts of the type
    "image" do, or before the first message of the user if it has no such part. Messages are text: special tokens that
    they spell are not read as such. Most chat templates write a BOS themselves. With ``bos="released"`` the tokenizer
    adds a second one, because the released LLaVA-CoT weights were trained with two.

    Args:
        system: the system prompt. A conversation may begin with its own instead.
        chat_template_kwargs: variables of the chat template, such as ``enable_thinking``.
        ask: turns the last text of the user into what is asked, such as ``Grammar.question``.

    Raises:
        ValueError: an empty question, a conversation that is none, or an image that cannot be read.
        TypeError: see ``open_image``.
    """
    check_question(question)
    images = [*map(open_image, images_of(image))]
    messages = messages_of(question, len(images), system)
    [*_, last] = (part for part in messages[-1]["content"] if part["type"] == "text")
    last["text"] = ask(last["text"])
    for message in messages:
        for part in message["content"]:
            if "text" in part:
                part["text"] = marked(part["text"], processor.tokenizer)
    text = render(processor, messages, add_generation_prompt=True, **(chat_template_kwargs or {}))
    return process(processor, images, text, bos)


def process(processor: ProcessorMixin, images: Sequence[Image.Image], text: str, bos: Bos = "one") -> Prompt:
    """Return the processor's inputs for one ``text``, as its chat template has written it. Parts may be ``marked``."""
    written = text.startswith(processor.tokenizer.bos_token or "")
    batch = processor(
        images=[list(images)] if images else None,
        text=text,
        add_special_tokens=bos == "released" or not written,
        return_tensors="pt",
    )
    batch = without_marks(batch, text, processor.tokenizer)
    return {name: tensor for name, tensor in batch.items() if name != "attention_mask"}  # nothing is padded


def check_fits(prompt: Prompt, model: PreTrainedModel, *, images: int) -> None:
    """Raise ``ValueError`` unless a prompt that a processor made can be one of this model."""
    ids, size = prompt["input_ids"], model.get_input_embeddings().weight.shape[0]
    if ids.max() >= size:
        raise ValueError(f"processor must be the model's, which has {size} tokens, got token {int(ids.max())}")
    image = model.config.image_token_id
    if images and not (ids == image).any():
        raise ValueError(f"processor must be the model's, whose images are tokens {image}, got a prompt without any")


def split_rows(inputs: dict[str, torch.Tensor], config: PreTrainedConfig) -> list[Prompt]:
    """Split a processor's batch into its rows, each without padding.

    ``config`` is the model's. It says which inputs must be given and which tokens stand for images. Rows without an
    image have none of the image inputs.

    Raises:
        ValueError: an input is missing or does not fit the others. The message names it.
        TypeError: an input is no tensor.
    """
    family = family_of(config)
    needed = [name for name in family.inputs if name not in family.optional]
    missing = [name for name in needed if inputs.get(name) is None]
    has_images = missing != needed[1:]
    if has_images and missing:
        raise ValueError(f"{missing[0]} must be given: a prompt with its images, as the processor makes them, got None")
    _check_shapes(inputs, family)
    input_ids = inputs["input_ids"]
    if input_ids.dtype not in (torch.int64, torch.int32) or input_ids.shape[1] == 0:
        got = f"{list(input_ids.shape)} of {input_ids.dtype}"
        raise ValueError(f"input_ids must have shape [batch, tokens >= 1] of int64, got {got}")
    attention_mask = inputs.get("attention_mask")
    keep = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    rows: list[Prompt] = [{"input_ids": ids[kept].unsqueeze(0)} for ids, kept in zip(input_ids, keep)]
    for index, row in enumerate(rows):
        if not row["input_ids"].numel():
            raise ValueError(f"attention_mask[{index}] must leave a token, got only zeros")
    if not has_images:
        if (input_ids == config.image_token_id).any():
            raise ValueError(f"{needed[1]} must be given where input_ids have the image token, got None")
        return rows
    return [row | images for row, images in zip(rows, family.split_images(inputs, keep))]


def _check_shapes(inputs: dict[str, torch.Tensor], family: Family) -> None:
    """Check that the inputs are tensors, and that dimensions of one name have one size."""
    sizes = dict(family.sizes)
    for name, dimensions in family.inputs.items():
        if (tensor := inputs.get(name)) is None:
            continue
        check_kind(name, tensor, torch.Tensor, "a tensor")
        if tensor.dim() != len(dimensions):
            raise ValueError(f"{name} must have shape [{', '.join(dimensions)}], got {list(tensor.shape)}")
        for at, (dimension, size) in enumerate(zip(dimensions, tensor.shape)):
            most = sizes.setdefault(dimension, size)
            may_be_less = name in family.may_end_early and dimension == "tokens" and size > 0
            if size > most or (size < most and not may_be_less):
                raise ValueError(f"{name} must have {dimension}={most} in dimension {at}, got {size}")
