"""How many kernels a decode step launches on CUDA, counted in the code that Inductor writes for it."""

import re
import sys
from math import prod
from pathlib import Path

import pytest
import torch
from helpers.random_mllama import build_random_mllama

pytest.importorskip("triton")
sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from step_model import PAGE_SIZE, Step, quantize_to_int8

TEXT, PRIVATE, TILES = 600, 75, 4
SHAPE = dict(hidden=512, ffn=1024, heads=4, kv_heads=2, vocab=128_256)  # the vocabulary of the 11B model
MOST_NODES = 420  # of one candidate on the 11B model
CACHE = (-(-(TEXT + PRIVATE) // PAGE_SIZE) + 1) * PAGE_SIZE * 2 * 128  # elements of a layer's keys


@pytest.fixture(scope="module")
def step():
    """A step of one candidate: 40 layers, of which every fifth attends to the image, as in the 11B model."""
    torch._dynamo.reset()
    with torch.device("meta"):
        model = build_random_mllama(**SHAPE, layers=40, cross=[*range(3, 40, 5)], seed=0).to(torch.bfloat16)
    return Step.trace(model, 1, TILES, TEXT, PRIVATE, compile=True)


def test_a_step_of_one_candidate_launches_few_kernels(step):
    nodes = step.nodes(compiled=True)
    gemms = 32 * 4 + 8 * 4 + 1  # q k v, o, gate up, down; q, o, gate up, down; the head
    assert nodes["GEMMs"] == gemms and (nodes["attention"], nodes["image attention"], nodes["sampler"]) == (32, 8, 1)
    assert nodes.total() <= MOST_NODES, nodes
    assert nodes.total() < step.nodes(compiled=False).total() / 3


def test_all_blocks_of_layers_share_their_code(step):
    runs = sorted(code.runs for code in step.codes)
    assert runs == [1, 1, 1, 1, 8]  # before the draw, rotary positions, the first norm, what draws; eight blocks


def test_no_page_is_copied(step):
    """Keys and values are written where they stay."""
    for code in step.codes:
        for size in re.findall(r"empty_strided_cuda\(\(([^)]*)\)", code.call):
            assert prod(map(int, re.findall(r"\d+", size))) < CACHE, code.call
    (block,) = (code for code in step.codes if code.runs == 8)
    pages = re.findall(r"paged_attention\.default\(\w+, (\w+), (\w+),", block.call)
    assert len(pages) == 4 and all(name.startswith("arg") for pair in pages for name in pair)
    for name in (name for pair in pages for name in pair):
        assert re.search(rf"triton_\w+\.run\([^)]*\b{name}\b", block.call), "a kernel must write into it"


def test_int8_weights_are_read_as_they_are():
    """By the project's kernel alone: nothing widens a weight in memory, and all blocks of layers share their code."""
    pytest.importorskip("torchao")
    torch._dynamo.reset()
    with torch.device("meta"):
        model = build_random_mllama(**SHAPE | {"kv_heads": 4}, layers=40, cross=[*range(3, 40, 5)], seed=0)
    quantize_to_int8(model := model.to(torch.bfloat16))
    step = Step.trace(model, 1, TILES, TEXT, PRIVATE, compile=True)
    assert sorted(code.runs for code in step.codes) == [1, 1, 1, 1, 8]
    (block,) = (code for code in step.codes if code.runs == 8)
    assert block.launches["torch.ops.llava_cot_kernels_triton.few_row_linear.default"] == 4 * 7 + 5
    assert not any("mm" in name for name in block.launches)
    nodes = step.nodes(compiled=True)
    assert nodes["GEMMs"] == 32 * 7 + 8 * 5 + 1 and nodes.total() <= 520, nodes
