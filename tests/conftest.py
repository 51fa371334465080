import pytest
import torch
from helpers.random_mllama import TINY_SHAPE, build_random_mllama

from llava_cot import SwiresGenerator, tiny_path


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
