"""What ``llava-cot serve`` is given, and what it says of what is wrong."""

import pytest

from llava_cot.serve.command import read_limits
from llava_cot.serve.presets import Presets


@pytest.mark.parametrize(
    "given, words",
    [
        ("max_n=1.5", "limit max_n must be a whole number, got '1.5'"),
        ("max_seconds=soon", "limit max_seconds must be a number, got 'soon'"),
        ("max=1", "limit must be NAME=VALUE with a name of"),
    ],
)
def test_a_wrong_limit_is_named(given, words):
    with pytest.raises(ValueError, match=words):
        read_limits([given])


def test_a_model_has_a_name():
    with pytest.raises(ValueError, match="name must not be empty: give --name"):
        Presets("", "greedy")
