"""What ``llava-cot serve`` is given, and what it says of what is wrong."""

import socket

import pytest
from typer.testing import CliRunner

from llava_cot.cli import app
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


@pytest.mark.parametrize(
    "given, words",
    [
        (["--scorer", "nice"], r"scorer must be one of \['by_stage', .*got 'nice'"),
        (["--host", "no.such.host.invalid", "--allow-no-key"], "host must be an address or a name of this machine"),
        (["--port", "{used}"], "port must be free for the server on 127.0.0.1, got [0-9]+: Address already in use"),
    ],
)
def test_what_can_be_told_is_told_before_the_weights_are_loaded(given, words, monkeypatch):
    from llava_cot.serve import command

    monkeypatch.setattr(command.SwiresGenerator, "from_pretrained", lambda *args, **settings: pytest.fail("it loads"))
    with socket.create_server(("127.0.0.1", 0)) as used:
        given = [each.format(used=used.getsockname()[1]) for each in given]
        with pytest.raises((ValueError, OSError), match=words):
            CliRunner().invoke(app, ["serve", "--model", "tiny", *given], catch_exceptions=False, standalone_mode=False)
