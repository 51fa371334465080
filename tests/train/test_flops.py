from typing import get_args

import pytest
import torch
from helpers.random_mllama import build_random_mllama, random_inputs
from helpers.random_qwen import MODELS, build_random_qwen
from PIL import Image
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoProcessor, MllamaConfig, Qwen2_5_VLConfig

from llava_cot.families import training_of
from llava_cot.tiny_qwen import tiny_qwen_path
from llava_cot.train.config import Part
from llava_cot.train.flops import _peak_of, peak_flops
from llava_cot.train.model import freeze

SHAPES = {
    "text is most": dict(hidden=96, layers=6, heads=6, kv_heads=2, cross=[1, 3], vocab=501),
    "vision is most": dict(
        hidden=32, layers=3, heads=4, kv_heads=4, cross=[2], vocab=97, image=56, vision_hidden=64, vision_layers=3
    ),
    "head is most": dict(hidden=32, layers=3, heads=4, kv_heads=2, cross=[1], vocab=5003, ffn=48),
}


def counted_of(model, inputs, supervised):
    """What torch counts of forward and backward, the head at the supervised tokens alone."""
    model.set_attn_implementation("eager")  # torch has no count for the CPU's fused attention
    with FlopCounterMode(display=False) as counter:
        hidden = model.model(**inputs, use_cache=False).last_hidden_state[0, -supervised:]
        cross_entropy(model.lm_head(hidden), inputs["input_ids"][0, -supervised:].clamp(max=96)).backward()
    return counter.get_total_flops()


def counted(model, *, length, supervised, image):
    inputs = random_inputs(model, length=length, ratio_id=6, seed=0)
    if not image:
        inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        inputs["input_ids"] = inputs["input_ids"].clamp(max=model.config.text_config.vocab_size - 1)
    return counted_of(model, inputs, supervised)


@pytest.mark.parametrize("image", [True, False], ids=["image", "text"])
@pytest.mark.parametrize("shape", SHAPES)
def test_as_torch_counts_them(shape, image):
    model = build_random_mllama(**SHAPES[shape], seed=0).train()
    found = training_of(model.config).flops(num_tokens=60, num_images=int(image), num_supervised=23)
    assert found == pytest.approx(counted(model, length=60, supervised=23, image=image), rel=0.01)


@pytest.mark.parametrize(
    "parts",
    [("vision",), ("language",), ("vision", "projector"), ("vision", "language"), ("language", "cross")],
    ids="-".join,
)
def test_as_torch_counts_them_with_frozen_parts(parts):
    model = build_random_mllama(**SHAPES["text is most"], seed=0).train()
    freeze(model, parts)
    found = training_of(model.config).flops(num_tokens=60, num_images=1, num_supervised=23, freeze=parts)
    # What is below the first trained layer needs no gradient of inputs; the formula does not know where that is.
    assert found == pytest.approx(counted(model, length=60, supervised=23, image=True), rel=0.12)
    assert found < training_of(model.config).flops(num_tokens=60, num_images=1, num_supervised=23)


@pytest.mark.parametrize(
    "sizes, parts",
    [
        ([], ()),
        ([(48, 48)], ()),
        ([(90, 20), (16, 16)], ()),
        ([(48, 48)], ("vision",)),
        ([(48, 48)], ("language",)),
        ([(48, 48)], ("vision", "projector")),
    ],
)
@pytest.mark.parametrize("model_type", MODELS)
def test_as_torch_counts_images_of_any_size(model_type, sizes, parts):
    processor = AutoProcessor.from_pretrained(tiny_qwen_path())
    model = build_random_qwen(model_type, processor, hidden=96, layers=4, vision_hidden=64).train()
    freeze(model, parts)
    text = "<|vision_start|><|image_pad|><|vision_end|>" * len(sizes) + "How many objects are not blue circles?" * 4
    images = {"images": [[Image.new("RGB", size) for size in sizes]]} if sizes else {}
    inputs = dict(processor(text=[text], **images, return_tensors="pt"))
    length, grids = inputs["input_ids"].shape[1], inputs.get("image_grid_thw")
    shown = {"num_images": len(sizes), "grids": grids, "num_pairs": length**2, "freeze": parts}
    found = training_of(model.config).flops(num_tokens=length, num_supervised=11, **shown)
    # As above, the formula does not know where the first trained layer is.
    assert found == pytest.approx(counted_of(model, inputs, 11), rel=0.12 if parts else 0.01)


def test_the_sizes_of_images_must_be_given():
    training = training_of(Qwen2_5_VLConfig())
    with pytest.raises(ValueError, match="grids must be those of num_images=2 images, got None"):
        training.flops(num_tokens=9, num_images=2)


def test_as_torch_counts_them_with_adapters():
    peft = pytest.importorskip("peft")
    model = build_random_mllama(**SHAPES["text is most"], seed=0).train()
    model.requires_grad_(False)
    peft.inject_adapter_in_model(peft.LoraConfig(r=1, target_modules=["q_proj", "v_proj"]), model)
    found = training_of(model.config).flops(num_tokens=60, num_images=1, num_supervised=23, adapters_only=True)
    assert found == pytest.approx(counted(model, length=60, supervised=23, image=True), rel=0.12)


def test_a_batch_is_the_sum_of_its_examples():
    flops = training_of(MllamaConfig()).flops
    one = {"num_tokens": 700, "num_images": 1, "num_supervised": 500, "num_pairs": 700**2}
    other = {"num_tokens": 300, "num_images": 1, "num_supervised": 100, "num_pairs": 300**2}
    both = {name: one[name] + other[name] for name in one}
    assert flops(**both) == pytest.approx(flops(**one) + flops(**other))
    assert flops(num_tokens=200, num_images=4) == pytest.approx(4 * flops(num_tokens=50, num_images=1))
    assert flops(num_tokens=0, num_images=0) == 0


def test_the_11b_model():
    """Its image and its text token, against a separate count of its weights: two FLOPs a weight and place, thrice."""
    config = MllamaConfig()
    config.vision_config.image_size = 560
    flops = training_of(config).flops
    text = flops(num_tokens=1, num_images=0, num_pairs=0)
    assert text == pytest.approx(6 * (32 * 218.1e6 + 128256 * 4096), rel=0.001)
    image = flops(num_tokens=0, num_images=1)
    layers, places = 40 * (4 * 1280**2 + 2 * 1280 * 5120), 4 * 1608
    attention = 40 * 2 * 1280 * places**2
    keys = 6404 * (7680 * 4096 + 8 * 2 * 4096 * 1024)
    assert image == pytest.approx(6 * (places * layers + attention + keys), rel=0.01)


@pytest.mark.parametrize(
    "name, peak",
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA A10G", 125e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA RTX A6000", 155e12),
        ("Tesla V100-SXM2-16GB", None),
        ("NVIDIA A1000", None),
    ],
)
def test_peaks(name, peak):
    assert _peak_of(name) == peak


def test_no_peak_without_a_gpu():
    assert peak_flops("cpu") is None
    if not torch.cuda.is_available():
        assert peak_flops(torch.device("cuda", 0)) is None


def test_the_parts_are_the_trainers():
    assert set(training_of(MllamaConfig()).parts) == set(get_args(Part))
