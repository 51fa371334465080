"""Compiled decoder layers: the same tokens, one compilation for all layers of a kind, and no copy of the pages."""

from pathlib import Path

import pytest
import torch
from helpers.jobs import Job, run
from helpers.random_llava import FAMILIES
from helpers.random_mllama import build_random_mllama, random_inputs

from llava_cot.core import Expand, Extend, SamplingParams
from llava_cot.engine.config import EngineConfig
from llava_cot.engine.engine import Engine
from llava_cot.prompt import split_rows
from llava_cot_kernels.stage_tags import StageTags

WILD = SamplingParams(temperature=1.2)
TAGS = StageTags([b"a", b"</x>"], ["</x>"])
KINDS = ("mllama", "windowed")  # layers that attend to an image, to everything, and to a window
DEEP = dict(hidden=32, layers=14, heads=4, kv_heads=2, cross=[2, 5, 8, 11], vocab=97)


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
    assert 1 <= graphs <= 10, "two kinds of layer, for one row and for many, with shared prefixes and without"
    assert grown < 1024, "the pages have 2 GiB of address space; copying them would make them resident"
