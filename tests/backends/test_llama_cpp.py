"""Searches on llama.cpp's server, an independent implementation of the protocol and of the model.

Greedy searches write what they write on the engine, stage by stage. Random ones have llama.cpp's own generator.
"""

import importlib.util
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from helpers.llama_server import write_gguf

from llava_cot import SwiresGenerator, connect
from llava_cot.core import Feature
from llava_cot.stages import Grammar

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("xllamacpp", "gguf")), reason="needs xllamacpp and gguf"
)
DEADLINE = 120  # seconds
QUESTION = "Describe the water cycle in a few sentences."
# What the bundled model writes without an image has few tags, but many fives.
FIVES = Grammar(
    {"step": ["step", "answer"], "answer": []},
    start=["step", "answer"],
    max_visits={"step": 64},
    tags={"step": ("", "5"), "answer": ("", "")},
)


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama") / "model.gguf"
    write_gguf(str(path))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1]), *sys.path]
    command = [sys.executable, "-m", "helpers.llama_server", str(path), str(port)]
    process = subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)}, stderr=subprocess.DEVNULL
    )
    end = time.monotonic() + DEADLINE
    while True:
        assert process.poll() is None and time.monotonic() < end
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                break
        except httpx.TransportError:
            pass
        time.sleep(0.05)
    yield f"http://127.0.0.1:{port}/v1"
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def remote(url):
    with connect(url, grammar=FIVES) as found:
        yield found


def test_it_is_seen_what_the_server_can_do(remote):
    assert remote.features == {Feature.LOGPROBS, Feature.SEEDS}
    with pytest.raises(ValueError, match=r"scorer='self_certainty' needs a back end with \['entropies'\]"):
        remote.answer(None, QUESTION, "best_of_n", scorer="self_certainty")


@pytest.mark.parametrize("search", ["greedy", "stage_beam"])
def test_greedy_searches_write_what_the_engine_writes(remote, search):
    settings = {"temperature": 0.0, "candidates": 1, "keep": 1} if search == "stage_beam" else {}
    local = SwiresGenerator.from_pretrained("tiny-qwen", grammar=FIVES)
    here, there = (each.answer(None, QUESTION, search, max_new_tokens=48, **settings) for each in (local, remote))
    texts = [[node["text"] for node in answer.trace.nodes.values()] for answer in (here, there)]
    assert texts[0] == texts[1] and len(texts[0]) == (1 if search == "greedy" else 12)
    assert there.usage.prompt_tokens == here.usage.prompt_tokens
    assert there.usage.generated_tokens == here.usage.generated_tokens
    for one, other in zip(here.trace.nodes.values(), there.trace.nodes.values()):
        told = other["logprobs"][:3]  # all but those of the stop string; its cache is in half precision
        assert told == pytest.approx(one["logprobs"][: len(told)], abs=0.05)


@pytest.mark.parametrize("search", ["best_of_n", "majority", "swires", "sentence_beam"])
def test_random_searches_repeat_themselves(remote, search):
    settings = {"cutoff": -5.0} if search == "swires" else {}
    one, other = (remote.answer(None, QUESTION, search, max_new_tokens=32, seed=1, **settings) for _ in range(2))
    assert one.text == other.text and one.tokens == other.tokens
    for node in one.trace.nodes.values():
        if node["finish"] == "tag" and node["stage"] == "step":
            assert node["text"].endswith("5") and node["text"].count("5") == 1
    texts = {}
    for node in one.trace.nodes.values():
        assert texts.setdefault(node["text"], node["tokens"]) == node["tokens"]
