"""Compiled steps: the same tokens, one compilation for all blocks of layers, and no copy of the pages."""

from pathlib import Path

import pytest
import torch
from helpers.jobs import Job, run
from helpers.random_llava import FAMILIES
from helpers.random_mllama import TINY_SHAPE, build_random_mllama, random_inputs

from llava_cot.check.random_models import CONFIGS, build_model
from llava_cot.core import Expand, Extend, SamplingParams
from llava_cot.engine.compile import block_size
from llava_cot.engine.config import EngineConfig
from llava_cot.engine.engine import Engine
from llava_cot.prompt import split_rows
from llava_cot_kernels.stage_tags import StageTags

WILD = SamplingParams(temperature=1.2)
TAGS = StageTags([b"a", b"</x>"], ["</x>"])
KINDS = ("mllama", "windowed")  # layers that attend to an image, to everything, and to a window
DEEP = dict(hidden=32, layers=8, heads=4, kv_heads=2, cross=[2, 6], vocab=97)


def program(root):
    """Of one row and of many, with and without rows that share a prefix; a prompt and an extension are not compiled."""
    (first,) = yield [Expand(root.id, (1, 2, 3), WILD, 6, frozenset())]
    (second,), (given,) = yield [Expand(first[0].id, (4,), WILD, 9, frozenset()), Extend(first[1].id, (5, 6, 7))]
    third, ranked = yield [Expand(given.id, (8, 9, 10, 11, 12), WILD, 7, frozenset()), Extend(first[2].id, top=2)]
    return [(b.tokens, b.logprobs) for b in (*first, second, given, *third)] + [
        ([*ranked[0].top], [*ranked[0].top.values()])
    ]


def resident_mib():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


@pytest.mark.parametrize("family", ["mllama", *FAMILIES])
@torch._inductor.config.patch(compile_threads=1)  # more need processes that import torch
def test_the_same_tokens(family, is_full):
    if not is_full and family not in KINDS:
        pytest.skip("its layers are of kinds that the others have; it runs with --full")
    torch._dynamo.reset()
    if family == "mllama":
        model = build_random_mllama(**DEEP, seed=0)
        inputs = [random_inputs(model, length=9, ratio_id=6, seed=seed) for seed in range(2)]
    else:
        build, make_inputs = FAMILIES[family]
        model = build(seed=3)
        inputs = [make_inputs(model, length=21, seed=seed) for seed in range(2)]
    results = []
    for compile in (False, True):
        engine = Engine(
            model, TAGS, config=EngineConfig(page_size=4, steps_per_look=3, compile=compile, draft_tokens=0)
        )
        engine.runner.replays = True  # as on CUDA
        jobs = [Job(split_rows(each, model.config)[0], program) for each in inputs]
        torch._dynamo.utils.counters.clear()
        before = resident_mib()
        run(engine, jobs[:1])
        run(engine, jobs)
        grown, graphs = resident_mib() - before, torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert [job.error for job in jobs] == [None, None]
        results.append([pair for job in jobs for pair in job.result])
    for (tokens, logprobs), (other, others) in zip(*results, strict=True):
        assert tokens == other and logprobs == pytest.approx(others, abs=1e-4)
    most = 15 if family == "gemma3" else 14  # it has rotary positions of two kinds
    assert 1 <= graphs <= most, "what blocks share and four small parts, for few numbers of rows and shared prefixes"
    assert grown < 1024, "the pages have 2 GiB of address space; copying them would make them resident"


@pytest.mark.parametrize(
    ("kinds", "size"),
    [
        ("a" * 32, 4),
        ("a" * 3, 4),
        ("aaaba" * 8, 5),
        ("aab" * 4, 6),
        ("aaaaab" * 4 + "aa", 6),
        ("aaaaaaaaab" * 4, 1),
    ],
)
def test_blocks_are_whole_periods(kinds, size):
    assert block_size([*kinds]) == size


def test_layers_with_hooks_are_not_compiled():
    """A hook on a layer is called with what it gets and returns, which has no place within a block."""
    model = build_random_mllama(**TINY_SHAPE, seed=0)
    model(input_ids=torch.tensor([[5, 6]]), attention_mask=torch.ones(1, 2))  # leaves hooks of transformers' own
    assert Engine(model, TAGS, config=EngineConfig(compile=True)).view.compiled is not None
    hook = model.model.language_model.layers[1].register_forward_hook(lambda module, args, output: output + 1)
    assert Engine(model, TAGS).view.compiled is None
    with pytest.raises(
        ValueError, match=r"model must have no hooks on its decoder layers with EngineConfig\(compile=T"
    ):
        Engine(model, TAGS, config=EngineConfig(compile=True))
    hook.remove()
    Engine(model, TAGS, config=EngineConfig(compile=True))


@pytest.mark.parametrize("name", CONFIGS)
def test_the_layers_of_every_family_are_found(name):
    assert Engine(build_model(name), TAGS, config=EngineConfig(compile=True)).view.compiled is not None
