"""Turn an image and a question into the inputs of a model, one sample at a time."""

import torch
from transformers import PreTrainedConfig, ProcessorMixin

from llava_cot.core import Bos
from llava_cot.families import Prompt, family_of
from llava_cot.image import ImageLike, open_image
from llava_cot.literal import marked, without_marks


def build_inputs(processor: ProcessorMixin, image: ImageLike, question: str, bos: Bos) -> Prompt:
    """Return the processor's inputs for one question: chat template, generation prompt and one BOS.

    The question is text: special tokens that it spells are not read as such. Most chat templates write a BOS
    themselves. With ``bos="released"`` the tokenizer adds a second one, because the released LLaVA-CoT weights were
    trained with two.

    Raises:
        ValueError: an empty question, or an image that cannot be read.
        TypeError: see ``open_image``.
    """
    check_question(question)
    content = [{"type": "image"}, {"type": "text", "text": marked(question, processor.tokenizer)}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    written = text.startswith(processor.tokenizer.bos_token or "")
    batch = processor(
        images=[[open_image(image)]],
        text=text,
        add_special_tokens=bos == "released" or not written,
        return_tensors="pt",
    )
    batch = without_marks(batch, text, processor.tokenizer)
    return {name: tensor for name, tensor in batch.items() if name != "attention_mask"}  # nothing is padded


def check_question(question: str) -> None:
    """Raise ``ValueError`` unless ``question`` is a non-empty string that UTF-8 can encode."""
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"question must be a non-empty string, got {question!r}")
    try:
        question.encode()
    except UnicodeEncodeError as error:
        half = question[error.start]
        raise ValueError(f"question must be Unicode text, got half a character {half!a} at {error.start}") from None


def split_rows(inputs: dict[str, torch.Tensor], config: PreTrainedConfig) -> list[Prompt]:
    """Split a processor's batch into its rows, each without padding.

    ``config`` is the model's. It says which inputs must be given and which tokens stand for images.

    Raises:
        ValueError: an input is missing or does not fit the others. The message names it.
    """
    family = family_of(config)
    for name in family.inputs:
        if name not in family.optional and inputs.get(name) is None:
            raise ValueError(f"{name} must be given: an image and its prompt, as the processor makes them, got None")
    input_ids = inputs["input_ids"]
    if input_ids.dim() != 2 or input_ids.shape[1] == 0:
        raise ValueError(f"input_ids must have shape [batch, tokens >= 1], got {list(input_ids.shape)}")
    for name, dimensions in family.inputs.items():
        if dimensions[0] == "batch" and inputs.get(name) is not None and len(inputs[name]) != len(input_ids):
            raise ValueError(f"{name} must have batch={len(input_ids)} in dimension 0, got {len(inputs[name])}")
    attention_mask = inputs.get("attention_mask")
    keep = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    if keep.shape != input_ids.shape:
        shapes = f"the shape of input_ids={list(input_ids.shape)}, got {list(keep.shape)}"
        raise ValueError(f"attention_mask must have {shapes}")
    rows = [{"input_ids": ids[kept].unsqueeze(0)} for ids, kept in zip(input_ids, keep)]
    return [row | images for row, images in zip(rows, family.split_images(inputs, keep))]
