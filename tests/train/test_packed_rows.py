"""Packed rows against unmodified transformers, sample by sample: hidden states, loss, gradients."""

import copy
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
from helpers.random_mllama import TINY_SHAPE, build_random_mllama
from helpers.random_qwen import build_random_qwen
from PIL import Image
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import AutoProcessor, MllamaImageProcessorPil, MllamaProcessor

from llava_cot.data.collate import Collator
from llava_cot.data.encode import expand_images
from llava_cot.data.example import IGNORE_INDEX, Example
from llava_cot.families import training_of
from llava_cot.tiny import tiny_path
from llava_cot.tiny_qwen import tiny_qwen_path
from tools.small_world.processor import VOCAB_SIZE

SIZES = [(28, 28), (28, 56), (90, 28), (56, 56), (20, 200)]  # of Mllama 1, 2, 3, 4 and 4 tiles


@dataclass(frozen=True)
class Family:
    name: str
    load: Callable  # the processor
    build: Callable  # a model for it
    image: str  # what the chat template writes for an image
    begin: str  # a special token


def mllama_processor():
    image_processor = MllamaImageProcessorPil(size={"height": 28, "width": 28}, max_image_tiles=4)
    tiny = AutoProcessor.from_pretrained(tiny_path())
    return MllamaProcessor(image_processor, tiny.tokenizer, chat_template=tiny.chat_template)


def build_mllama(processor):
    return build_random_mllama(**TINY_SHAPE | {"vocab": VOCAB_SIZE}, seed=0, std=0.1)


QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
FAMILIES = {
    "mllama": Family("mllama", mllama_processor, build_mllama, "<|image|>", "<|begin_of_text|>"),
    **{
        name: Family(
            name,
            partial(AutoProcessor.from_pretrained, tiny_qwen_path()),
            partial(build_random_qwen, name),
            QWEN_IMAGE,
            "<|im_start|>",
        )
        for name in ("qwen2_5_vl", "qwen3_vl")
    },
}
of_mllama = pytest.mark.parametrize("family", ["mllama"], indirect=True)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def processor(family):
    return family.load()


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    random, folder = np.random.default_rng(0), tmp_path_factory.mktemp("images")
    for index, (width, height) in enumerate(SIZES):
        pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return [str(folder / f"{index}.png") for index in range(len(SIZES))]


@pytest.fixture(scope="module", params=[torch.float64, torch.float32], ids=["float64", "float32"])
def models(request, family, processor):
    """(unmodified, with the hooks): the same weights."""
    plain = family.build(processor).to(request.param)
    hooked = copy.deepcopy(plain)
    training_of(hooked.config).prepare(hooked)
    return plain, hooked


@dataclass(frozen=True)
class Sample:
    text: str
    example: Example


def sample(images: list[str], text: str, family, processor, training) -> Sample:
    """The tokens of ``text``, where ``@`` is an image; most of those behind the last image are learnt."""
    draw = random.Random(text)
    text = text.replace("@", family.image).replace("^", family.begin)
    ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    first = max((place for place, token in enumerate(ids) if token == processor.image_token_id), default=3) + 1
    labels = [token if index >= first and draw.random() < 0.7 else IGNORE_INDEX for index, token in enumerate(ids)]
    stages = [index % 4 if label >= 0 else -1 for index, label in enumerate(labels)]
    return Sample(text, expand_images(Example(ids, labels, stages, images), processor, training))


@pytest.fixture(scope="module")
def samples(images, family, processor, models) -> dict[str, Sample]:
    texts = {
        "image first": ("@^ the picture shows a blue square", images[:1]),
        "image not first": ("^ what is this? @ two circles, one of them red, and a triangle", images[1:2]),
        "three tiles": ("^ hm @ count", images[2:3]),
        "no image": ("^ how many is 3 and 4? 7", []),
        "two images": ("^ look @@ the first has more objects", [images[3], images[0]]),
        "two images apart": ("^ here is one: @ and here is another: @ they differ in colour", [images[4], images[2]]),
        "one image twice": ("^ these @@@ are three, or two", [images[1], images[1], images[3]]),
        "one token": ("^", []),
    }
    training = training_of(models[0].config)
    return {name: sample(files, text, family, processor, training) for name, (text, files) in texts.items()}


LAYOUTS = {
    "one a row": [[name] for name in ("image first", "image not first", "three tiles", "two images apart")],
    "one a row, some without": [["no image"], ["image not first"], ["one token"]],
    "packed": [["image not first", "three tiles", "image first"]],
    "packed, several images": [["two images", "image not first"], ["one image twice", "two images apart", "one token"]],
    "packed, some without": [["no image", "image not first", "one token", "three tiles", "no image"], ["no image"], []],
    "without any": [["no image", "one token"], ["no image"]],
    "the same file in several": [
        ["image not first", "image not first", "one image twice"],
        ["two images", "two images"],
    ],
}


def rows_of(samples: dict[str, Sample], layout: list[list[str]]) -> list[list[Example]]:
    return [[samples[name].example for name in row] for row in layout]


def processed(sample: Sample, processor) -> dict[str, torch.Tensor]:
    """What the processor makes of the sample alone."""
    paths = sample.example.images
    images = {"images": [[Image.open(path) for path in paths]]} if paths else {}
    inputs = processor(text=[sample.text], **images, add_special_tokens=False, return_tensors="pt")
    assert inputs["input_ids"].tolist() == [sample.example.input_ids]
    return dict(inputs)


def floats(inputs: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: value.to(dtype) if name == "pixel_values" else value for name, value in inputs.items()}


def summed_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="sum")


def gradients(model) -> dict[str, torch.Tensor]:
    found = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in model.named_parameters()
    }
    model.zero_grad()
    return found


def packed_loss(model, batch) -> torch.Tensor:
    inputs = floats(batch.inputs, model.dtype)
    hidden = model.model(**inputs, use_cache=False).last_hidden_state
    return summed_loss(model.lm_head(hidden), batch.targets)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_packed_rows_are_transformers_own(models, processor, samples, layout):
    plain, hooked = models
    batch = Collator(processor, hooked.config, pad_to_multiple_of=8)(rows_of(samples, LAYOUTS[layout]))
    tolerance = 1e-9 if plain.dtype == torch.float64 else 2e-4

    with torch.no_grad():
        inputs = floats(batch.inputs, hooked.dtype)
        packed = hooked.model(**inputs, use_cache=False).last_hidden_state
    total, transformers_total = torch.zeros((), dtype=plain.dtype), 0.0
    shown = [[samples[name] for name in row] for row in LAYOUTS[layout]]
    for index, row in enumerate(shown):
        start = 0
        for sample in row:
            inputs = floats(processed(sample, processor), plain.dtype)
            labels = torch.tensor([sample.example.labels])
            hidden = plain.model(**inputs, use_cache=False).last_hidden_state
            end = start + hidden.shape[1]
            torch.testing.assert_close(packed[index, start:end], hidden[0].detach(), rtol=tolerance, atol=tolerance)
            start = end
            count = int((labels[:, 1:] >= 0).sum())
            if count:
                total = total + summed_loss(plain.lm_head(hidden)[:, :-1], labels[:, 1:])
                transformers_total += plain(**inputs, labels=labels, use_cache=False).loss.item() * count
    total.backward()
    loss = packed_loss(hooked, batch)
    loss.backward()
    torch.testing.assert_close(loss, total, rtol=tolerance, atol=tolerance)
    assert loss.item() == pytest.approx(transformers_total, rel=2e-6)
    assert batch.num_tokens == sum(label >= 0 for row in shown for one in row for label in one.example.labels[1:])
    expected = gradients(plain)
    tolerance = max(tolerance, 1e-7)  # transformers' norms compute in float32 whatever they are given
    for name, gradient in gradients(hooked).items():
        scale = expected[name].abs().max().item() + 1e-3
        torch.testing.assert_close(gradient / scale, expected[name] / scale, rtol=0, atol=tolerance, msg=name)


def test_the_image_matters_and_a_sequence_does_not_see_another(family, models, processor, samples):
    _, hooked = models
    layout = [["image not first", "no image", "two images"], ["three tiles"]]
    batch = Collator(processor, hooked.config)(rows_of(samples, layout))
    inputs = floats(batch.inputs, hooked.dtype)
    with torch.no_grad():
        before = hooked.model(**inputs, use_cache=False).last_hidden_state
        inputs["pixel_values"] = inputs["pixel_values"].clone()
        first = inputs["pixel_values"][0]
        first[0 if first.dim() > 1 else ...] += 1.0  # the first sample's image, or a patch of it
        after = hooked.model(**inputs, use_cache=False).last_hidden_state
    differs = (before != after).any(-1)
    ids = samples["image not first"].example.input_ids
    # In transformers, Mllama's tokens before the image token see it too.
    start, length = 0 if family.name == "mllama" else ids.index(processor.image_token_id), len(ids)
    assert differs[0, start:length].all() and not differs[0, :start].any()
    assert not differs[0, length:].any() and not differs[1].any()


@of_mllama
def test_without_cross_rows_a_call_is_as_before(models, processor, samples):
    plain, hooked = models
    inputs = floats(processed(samples["image not first"], processor), plain.dtype)
    with torch.no_grad():
        assert torch.equal(plain(**inputs).logits, hooked(**inputs).logits)


def test_recomputed_layers_have_the_same_gradients(models, processor, samples):
    _, hooked = models
    batch = Collator(processor, hooked.config)(rows_of(samples, LAYOUTS["packed, several images"]))
    packed_loss(hooked, batch).backward()
    expected = gradients(hooked)
    wrapped = copy.deepcopy(hooked)
    kinds = {kind for module in wrapped.modules() for kind in getattr(module, "_no_split_modules", None) or ()}
    for module in list(wrapped.modules()):
        for name, child in module.named_children():
            if type(child).__name__ in kinds:
                setattr(module, name, checkpoint_wrapper(child))
    assert any("_checkpoint_wrapped_module" in name for name, _ in wrapped.named_parameters())
    packed_loss(wrapped, batch).backward()
    found = {name.replace("_checkpoint_wrapped_module.", ""): grad for name, grad in gradients(wrapped).items()}
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


def test_a_batch_without_any_image_reaches_every_parameter(models, processor, samples):
    """All ranks must have the same gradients to reduce; those of the vision tower and what reads it are zero."""
    _, hooked = models
    collator = Collator(processor, hooked.config)
    batch = collator([[samples["no image"].example], []])
    assert collator.training.count_images(batch.inputs)["num_images"] == 0
    packed_loss(hooked, batch).backward()
    assert all(parameter.grad is not None for parameter in hooked.parameters())
    parts = collator.training.parts
    unseen = [parts[part] for part in ("vision", "projector", "cross") if part in parts]
    for name, gradient in gradients(hooked).items():
        assert gradient.any() != any(re.match(pattern, name) for pattern in unseen), name


def test_the_largest_images_are_inputs_too(models):
    _, hooked = models
    training = training_of(hooked.config)
    text = {name: torch.zeros(2, 40, dtype=torch.int64) for name in ("input_ids", "position_ids")}
    inputs = floats(training.full_images(text, images_per_row=3), hooked.dtype)
    assert training.count_images(inputs)["num_images"] == 6
    assert hooked.model(**inputs, use_cache=False).last_hidden_state.isfinite().all()
