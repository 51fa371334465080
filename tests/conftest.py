import os
from collections import Counter

import pytest
import torch
from helpers.random_mllama import TINY_SHAPE, build_random_mllama

from llava_cot import SwiresGenerator, tiny_path

BACKENDS = {"reference", "native", "fibers", "triton", "cuda"}


def pytest_terminal_summary(terminalreporter):
    """Which back ends ran: a skip is not a pass. "fibers" are the CUDA sources in the host build of tests/fibers."""
    passed = Counter()
    for report in terminalreporter.stats.get("passed", []):
        passed.update(value for name, value in report.user_properties if name == "backend")
    ran = ", ".join(f"{name} {count}" for name, count in sorted(passed.items()))
    interpreted = " (interpreted)" if os.environ.get("TRITON_INTERPRET") == "1" else ""
    terminalreporter.write_line(f"tests passed by back end: {ran or 'none'}".replace("triton", f"triton{interpreted}"))


@pytest.fixture(autouse=True)
def record_backend(request):
    parameters = request.node.callspec.params.values() if hasattr(request.node, "callspec") else ()
    found = {value for value in parameters if isinstance(value, str)} & BACKENDS
    if not found and "triton" in request.node.path.name:
        found = {"triton"}
    request.node.user_properties.extend(("backend", name) for name in found)


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Two threads make so small a model many times slower."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny():
    """The bundled model behind a generator."""
    return SwiresGenerator.from_pretrained("tiny", page_size=4)


@pytest.fixture(scope="session")
def fresh_tiny():
    """The bundled model, loaded by transformers alone."""
    from transformers import MllamaForConditionalGeneration

    return MllamaForConditionalGeneration.from_pretrained(tiny_path())


@pytest.fixture(scope="session")
def random_model():
    """A random Mllama with four tiles an image and opened gates."""
    return build_random_mllama(**TINY_SHAPE, seed=0)


@pytest.fixture
def bare_generator(tiny):
    """A generator on any model; its processor only stands in for a tokenizer."""

    def make(model, **kwargs):
        return SwiresGenerator(model, tiny.processor, **kwargs)

    return make
