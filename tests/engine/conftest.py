"""Fixtures of the tests of fused weights."""

import pytest
from helpers.fused import build

from llava_cot.engine import fused


@pytest.fixture
def as_on_cuda(monkeypatch):
    """Engines on a CPU fuse products too."""
    monkeypatch.setattr(fused, "DEVICES", {"cpu", "cuda"})


@pytest.fixture
def model():
    return build("mllama")[0]


@pytest.fixture
def inputs():
    return build("mllama")[1]
