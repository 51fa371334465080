"""A forward pass on buffers that stay where they are is the pass it stands for."""

import pytest
from helpers.jobs import Job, run
from helpers.random_llava import FAMILIES
from helpers.random_mllama import TINY_SHAPE, build_random_mllama, random_inputs
from helpers.recording import Noting

from llava_cot.core import Expand, Extend, Release, SamplingParams
from llava_cot.engine import runner
from llava_cot.engine.config import EngineConfig
from llava_cot.engine.engine import Engine
from llava_cot.prompt import split_rows
from llava_cot_kernels.stage_tags import StageTags

WILD = SamplingParams(temperature=1.2)
TAGS = StageTags([b"a", b"</x>"], ["</x>"])


def mixed(seed):
    """Growing, ranked and extended branches, of widths that are no bucket's."""

    def program(root):
        (first,) = yield [Expand(root.id, tuple(range(seed, seed + 3 + seed)), WILD, 5, frozenset())]
        second, (given,), ranked = yield [
            Expand(first[0].id, (seed + 9, seed + 10), WILD, 6, frozenset()),
            Extend(first[1].id, (5, 6, 7)),
            Extend(root.id, top=3),
        ]
        for _ in range(3):
            longer = [Extend(b.id, (token,), top=3, generated=True) for b in ranked[:1] for token in b.top]
            replies = yield [*longer, Release(tuple(b.id for b in ranked))]
            ranked = [b for (b,) in replies[:-1]]
        return [(b.tokens, b.logprobs) for b in (*first, *second, given, *ranked)]

    return program


def run_mixed(model, inputs, replays):
    config = EngineConfig(page_size=4, num_pages=400, steps_per_look=1, canary=replays, compile=False)
    engine = Engine(model, TAGS, config=config)
    engine.runner.replays = replays
    jobs = [Job(split_rows(each, model.config)[0], mixed(seed)) for seed, each in enumerate(inputs)]
    run(engine, jobs)
    assert [job.error for job in jobs] == [None] * len(jobs)
    assert bool(engine.runner.replay.captured) == replays
    assert (engine.pages_in_use, engine.images_in_use) == (0, 0)
    return [pair for job in jobs for pair in job.result]


@pytest.mark.parametrize("device", ["noted", "cpu", "cuda"])
@pytest.mark.parametrize("family", ["mllama", *FAMILIES])
@pytest.mark.parametrize("count", [1, 3])
def test_a_replayed_pass_is_the_pass(monkeypatch, family, count, device):
    if device == "noted":
        monkeypatch.setattr(runner, "open_recorder", Noting)
        device = "cpu"
    if family == "mllama":
        model = build_random_mllama(**TINY_SHAPE, seed=0).to(device)
        inputs = [
            random_inputs(model, length=9 + seed, ratio_id=1 + 5 * (seed % 2), seed=seed) for seed in range(count)
        ]
    else:
        build, make_inputs = FAMILIES[family]
        model = build(seed=3).to(device)
        inputs = [make_inputs(model, length=21 + seed, seed=seed) for seed in range(count)]
    expected, found = run_mixed(model, inputs, False), run_mixed(model, inputs, True)
    for (tokens, logprobs), (other, others) in zip(found, expected, strict=True):
        assert tokens == other and logprobs == pytest.approx(others, abs=1e-4)
