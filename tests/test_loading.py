"""What can be told of the arguments of ``from_pretrained`` is told before any weights are loaded."""

from pathlib import Path

import pytest
import torch

from llava_cot import EngineConfig, SwiresGenerator
from llava_cot import generator as module
from llava_cot.loading import check_dtype, check_name

NO_CUDA = [] if torch.cuda.is_available() else ["cuda:0", 0, torch.device("cuda"), torch.device("cuda:1")]


@pytest.fixture(autouse=True)
def no_weights(monkeypatch):
    def load(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(module.AutoModelForImageTextToText, "from_pretrained", load)


@pytest.mark.parametrize("device", ["gpu", "cpu:x", "mps", -1, 3.5, *NO_CUDA], ids=str)
def test_devices_that_are_not_here(device):
    with pytest.raises(ValueError, match="device must be one that torch can use here, got "):
        SwiresGenerator.from_pretrained("tiny", device=device)


@pytest.mark.parametrize(
    "dtype", ["fp16", "half", "int8", torch.int8, torch.float64, "float8_e4m3fn", 16, None], ids=str
)
def test_dtypes_that_the_kernels_do_not_have(dtype):
    with pytest.raises(ValueError, match=r"dtype must be 'auto' or one of .* got "):
        SwiresGenerator.from_pretrained("tiny", dtype=dtype)


@pytest.mark.parametrize("name", ["/no/such/folder", "./none", "~/none", "..none", Path("none"), "", " "], ids=repr)
def test_folders_that_are_not_there(name):
    with pytest.raises(ValueError, match="name must be a folder or a hub name, got "):
        SwiresGenerator.from_pretrained(name)


@pytest.mark.parametrize("name", [None, 3, b"tiny", ["tiny"]])
def test_names_of_another_type(name):
    with pytest.raises(TypeError, match="name must be a folder or a hub name, got "):
        SwiresGenerator.from_pretrained(name)


def test_what_may_be_right(tmp_path):
    for name in ("tiny", "meta-llama/Llama-3.2-11B-Vision", tmp_path, str(tmp_path), "model"):
        check_name(name)
    for dtype in ("auto", "float16", "torch.bfloat16", torch.float32):
        check_dtype(dtype)


def test_the_processor_comes_from_where_the_model_does(monkeypatch, tiny):
    asked = {}
    monkeypatch.setattr(module.AutoModelForImageTextToText, "from_pretrained", lambda name, **given: tiny.model)
    monkeypatch.setattr(
        module.AutoProcessor, "from_pretrained", lambda name, **given: asked.update(given) or tiny.processor
    )
    source = {"revision": "abc", "subfolder": "deep", "token": "t", "cache_dir": "c", "local_files_only": True}
    SwiresGenerator.from_pretrained("some/model", **source, low_cpu_mem_usage=True)
    assert asked == source


def test_pages_that_no_memory_holds(tiny):
    with pytest.raises(ValueError, match=r"num_pages must fit into memory, got 1000000000000: 30517578.1 GiB"):
        SwiresGenerator(tiny.model, tiny.processor, engine=EngineConfig(num_pages=10**12))
