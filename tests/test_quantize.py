"""Names of ``quantize``: what can be told before weights are loaded, and the plan of the memory that they take."""

from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch
from helpers.random_llava import FAMILIES
from helpers.random_mllama import TINY_SHAPE, build_random_mllama
from rich.console import Console
from transformers import AutoConfig

from llava_cot import SwiresGenerator, quantize
from llava_cot import generator as module
from llava_cot.engine.plan import GB, memory_plan, parse_memory, print_plan
from llava_cot.quantize import QUANTIZATIONS, check_quantize, loading_settings

LLAMA_11B = Path(__file__).parents[1] / "configs" / "llama_3_2_11b_vision"
CARD = 24 * GB


@pytest.fixture
def no_weights(monkeypatch):
    def load(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(module.AutoModelForImageTextToText, "from_pretrained", load)


@pytest.fixture
def installed(monkeypatch):
    """Every package in its least version."""
    least = {package: version for way in QUANTIZATIONS.values() for package, version in way.packages.items()}
    monkeypatch.setattr(quantize, "version", least.__getitem__)
    return least


@pytest.mark.parametrize("name", ["int5", "INT4", "", 4, True, ["int4"]], ids=repr)
def test_unknown_names(name, no_weights):
    with pytest.raises(ValueError, match=r"quantize must be one of \['float8', 'int4', 'int8', 'nf4'\], got "):
        SwiresGenerator.from_pretrained("tiny", quantize=name)


def test_a_cpu_without_float8(no_weights):
    message = "device must be a GPU of compute capability 8.9 or higher with quantize='float8', got 'cpu'"
    for device in (None, "cpu"):
        with pytest.raises(ValueError, match=message):
            SwiresGenerator.from_pretrained("tiny", quantize="float8", device=device)


@pytest.mark.parametrize(
    "name, too_old, new_enough", [("int8", (7, 0), (7, 5)), ("int4", (7, 5), (8, 0)), ("float8", (8, 6), (8, 9))]
)
def test_gpus(monkeypatch, installed, name, too_old, new_enough):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: too_old)
    least, found = (f"{major}.{minor}" for major, minor in (new_enough, too_old))
    with pytest.raises(ValueError, match=rf"compute capability {least} or higher with .* got 'cuda:1' of {found}"):
        check_quantize(name, "auto", "cuda:1")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: new_enough)
    check_quantize(name, "auto", torch.device("cuda:1"))


def test_other_devices(installed):
    with pytest.raises(ValueError, match=r"must be the CPU or a GPU of .* got 'mps'"):
        check_quantize("int4", "auto", "mps")


@pytest.mark.parametrize("dtype", [torch.float32, "float16"])
def test_a_dtype_without_int4(no_weights, dtype):
    with pytest.raises(ValueError, match=r"dtype must be torch\.bfloat16 with quantize='int4', got torch\.float"):
        SwiresGenerator.from_pretrained("tiny", quantize="int4", dtype=dtype)


@pytest.mark.parametrize("name, package", [("int8", "torchao"), ("int4", "torchao"), ("nf4", "bitsandbytes")])
def test_packages(monkeypatch, installed, no_weights, name, package):
    installed[package] = "0.17.2"
    advice = r"pip install 'llava-cot\[quantize\]'"
    with pytest.raises(ValueError, match=rf"quantize='{name}' needs {package}>=0\.\d+, got 0.17.2: {advice}"):
        SwiresGenerator.from_pretrained("tiny", quantize=name)

    def nothing(package):
        raise PackageNotFoundError(package)

    monkeypatch.setattr(quantize, "version", nothing)
    with pytest.raises(ValueError, match=rf"quantize='{name}' needs {package}>=0\.\d+, which is not .*: {advice}"):
        SwiresGenerator.from_pretrained("tiny", quantize=name)


@pytest.mark.parametrize("argument, value", [("quantization_config", object()), ("device_map", "auto")])
def test_two_ways_at_once(installed, no_weights, argument, value):
    with pytest.raises(ValueError, match=f"{argument} must not be given with quantize, got quantize='int4'"):
        SwiresGenerator.from_pretrained("tiny", quantize="int4", **{argument: value})


def test_models_that_can_not_be_quantised(tmp_path, installed, no_weights):
    build_random_mllama(**TINY_SHAPE, seed=0).save_pretrained(tmp_path)
    for name, size in (("int4", "32 x 32 in model.language_model.layers.0.self_attn.q_proj"), ("nf4", "32 x 32")):
        with pytest.raises(ValueError, match=rf"quantize='{name}' needs matrices of a multiple of .* got {size}"):
            SwiresGenerator.from_pretrained(tmp_path, quantize=name)
    config = AutoConfig.from_pretrained(tmp_path)
    config.quantization_config = {"quant_method": "torchao"}
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="quantize must be None for a model that is quantised already, got 'int8'"):
        SwiresGenerator.from_pretrained(tmp_path, quantize="int8")


@pytest.mark.parametrize("name", QUANTIZATIONS)
def test_the_config_of_transformers(name):
    """For a GPU too, where none is."""
    for package in QUANTIZATIONS[name].packages:
        pytest.importorskip(package)
    config = AutoConfig.from_pretrained(LLAMA_11B)
    settings = loading_settings(name, config, "auto", "cuda")
    assert settings["dtype"] == torch.bfloat16 and settings["device_map"] == {"": torch.device("cuda")}
    found = settings["quantization_config"].to_dict()
    assert found["quant_method"] == ("bitsandbytes" if name == "nf4" else "torchao")


def test_the_dtype_of_a_checkpoint():
    config = build_random_mllama(**TINY_SHAPE, seed=0).config
    config.dtype = "float16"
    assert quantize.dtype_of(config, "nf4") == torch.float16
    assert quantize.dtype_of(config, "int4") == torch.bfloat16


@pytest.mark.parametrize("name", QUANTIZATIONS)
def test_a_card_of_24_gb(name):
    """It holds the 11B model with 16 candidates of 2,048 tokens, and not in bfloat16."""
    config = AutoConfig.from_pretrained(LLAMA_11B)
    plan = memory_plan(config, quantize=name, candidates=16, prompt_tokens=512, new_tokens=2048)
    assert plan.fits(CARD) and plan.fits_by_default(CARD)
    assert plan.parts["pages"] == (512 + 16 * 2048 + 16) * 131_072  # bytes a token in bfloat16; a page is spare
    plain = memory_plan(config, candidates=16, prompt_tokens=512, new_tokens=2048)
    assert not plain.fits(CARD) and plain.weights > 0.85 * CARD
    assert {part: plain.parts[part] for part in ("other weights", "pages", "image")} == {
        part: plan.parts[part] for part in ("other weights", "pages", "image")
    }
    bits = {"int8": 8, "float8": 8, "int4": 4, "nf4": 4}[name]
    ratio = plan.parts["decoder layers"] / plain.parts["decoder layers"]
    assert bits / 16 <= ratio < 1.13 * bits / 16, "scales take at most an eighth more"


@pytest.mark.parametrize("family", FAMILIES)
def test_plans_of_other_families(family):
    model = FAMILIES[family][0]()
    model.config.dtype = torch.float16
    plan = memory_plan(model.config, dtype=torch.float32, candidates=3, prompt_tokens=21, new_tokens=9, page_size=4)
    assert plan.weights == sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    assert model.config.dtype == torch.float16, "the caller's config stays as it is"
    assert plan.num_pages == 6 + 3 * 3 and plan.parts["image"] == 0 < plan.parts["working memory"]


def test_sizes_of_a_plan():
    config = AutoConfig.from_pretrained(LLAMA_11B)
    for wrong in ({"candidates": 0}, {"prompt_tokens": -1}, {"new_tokens": 0}):
        (name,) = wrong
        with pytest.raises(ValueError, match=f"{name} must be >= 1, got {wrong[name]}"):
            memory_plan(config, **wrong)
    assert (parse_memory("24GB"), parse_memory(" 11.5 gb ")) == (CARD, 11_500_000_000)
    for gpu in ("24", "1x24GB", "0GB", "GB", "-1GB"):
        with pytest.raises(ValueError, match=r"gpu must be its memory in GB .* got "):
            parse_memory(gpu)


def test_pages_that_must_be_asked_for():
    """Where all fits, but not into the share that an engine takes by default."""
    plan = memory_plan(AutoConfig.from_pretrained(LLAMA_11B), quantize="int4", candidates=40, new_tokens=2048)
    assert plan.fits(CARD) and not plan.fits_by_default(CARD)
    console = Console(width=300, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_plan(plan, CARD, console)
    assert f"Set EngineConfig(num_pages={plan.num_pages})" in console.export_text()
