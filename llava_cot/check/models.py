"""What the kit runs on: a model by name, with real or random weights, and questions about random images."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from llava_cot.bundled import model_path
from llava_cot.check.kit import Inputs, Kit
from llava_cot.check.random_models import CONFIGS, build_model, make_inputs, randomize
from llava_cot.generator import SwiresGenerator
from llava_cot.loading import check_device, check_dtype, check_name
from llava_cot.prompt import build_inputs
from llava_cot.stages import Grammar
from llava_cot.tiny import tiny_path

# (size of each image, question); prompts that differ in everything
QUESTIONS: list[tuple[list[tuple[int, int]], str]] = [
    ([(112, 80)], "How many shapes are there?"),
    ([(64, 64), (200, 96)], "What differs between the two images, and which one is larger? Explain it step by step."),
    ([], "What is the sum of 17 and 25?"),
]


def random_kit(name: str, *, seed: int = 3, dtype: str = "float32") -> Kit:
    """Return the kit of one of ``CONFIGS``, with random weights and the tokenizer of the bundled model."""
    model = build_model(name, seed=seed).to(getattr(torch, dtype))
    processor = AutoProcessor.from_pretrained(tiny_path())
    prompts = [make_inputs(model, length=length, images=count, seed=length) for length, count in _LENGTHS]
    return Kit(model, processor, [_cast(prompt, model) for prompt in prompts])


_LENGTHS = ((20, 1), (61, 2), (13, 0))  # tokens and images of each prompt


def load_kit(
    name: str | Path,
    *,
    random: bool = False,
    dtype: str = "auto",
    device: str | None = None,
    quantize: str | None = None,
    grammar: Grammar | str | None = None,
) -> Kit:
    """Return the kit of a model folder or a hub name. ``random`` draws new weights for its configuration.

    With ``random`` the name may also be one of ``CONFIGS``: the smallest model of that family. The other arguments are
    those of ``SwiresGenerator.from_pretrained``.

    Raises:
        ValueError, TypeError: naming the argument that is wrong, before weights are loaded.
    """
    if not random:
        generator = SwiresGenerator.from_pretrained(
            name, dtype=dtype, device=device, quantize=quantize, grammar=grammar
        )
        return _kit(generator)
    check_dtype(dtype)
    if device is not None:
        check_device(device)
    if quantize is not None:
        raise ValueError(f"quantize must be None with random weights, got {quantize!r}")
    if str(name) in CONFIGS:
        return random_kit(str(name), dtype="float32" if dtype == "auto" else dtype.removeprefix("torch."))
    check_name(name)
    path = model_path(name)
    model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(path), dtype=dtype)
    randomize(model)
    model = model.to(device or "cpu").eval()
    return _kit(SwiresGenerator(model, AutoProcessor.from_pretrained(path), grammar=grammar))


def _kit(generator: SwiresGenerator) -> Kit:
    model, processor = generator.model, generator.processor
    return Kit(model, processor, questions(model, processor), grammar=generator.grammar)


def questions(model: Any, processor: Any) -> list[Inputs]:
    """Return the inputs of ``QUESTIONS`` about random images."""
    rng, prompts = np.random.default_rng(0), []
    for sizes, question in QUESTIONS:
        pixels = [rng.integers(0, 256, (height, width, 3), dtype=np.uint8) for width, height in sizes]
        prompt = build_inputs(processor, [*map(Image.fromarray, pixels)], question, "one")
        prompts.append(_cast({**prompt, "attention_mask": torch.ones_like(prompt["input_ids"])}, model))
    return prompts


def _cast(inputs: Inputs, model: Any) -> Inputs:
    """Move inputs to the model's device, and pixels to its dtype."""
    moved = {name: value.to(model.device) for name, value in inputs.items()}
    return {name: value.to(model.dtype) if value.is_floating_point() else value for name, value in moved.items()}
