"""Several steps between two looks of the host: the same branches, and nothing in between that needs the host."""

import functools
from dataclasses import asdict
from typing import Any

import pytest
import torch
from helpers.jobs import Job, run
from helpers.random_llava import FAMILIES
from helpers.random_mllama import TINY_SHAPE, build_random_mllama, random_inputs
from helpers.recording import Noting
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llava_cot.core import Expand, Finish, Limit, SamplingParams, Usage
from llava_cot.engine import graphs, runner
from llava_cot.engine.branch import Branch
from llava_cot.engine.config import EngineConfig
from llava_cot.engine.draw import Row, Run, grow, grow_along
from llava_cot.engine.engine import Engine
from llava_cot.engine.graphs import Recorder, Shape, StepBuffers, Window
from llava_cot.engine.model import ModelView
from llava_cot.engine.session import Slot
from llava_cot.prompt import split_rows
from llava_cot_kernels import backend
from llava_cot_kernels.stage_tags import StageTags

WILD = SamplingParams(temperature=1.2, top_p=0.95)
VOCABULARY = [b"a", b"b</", b"x>", b"</x", b">c"] * 20  # of 97 tokens: a tag closes every few of them, often inside one


@pytest.fixture(scope="module")
def tags():
    return StageTags(VOCABULARY, ["</x>", "c"])


def searches() -> list[Any]:
    """Programs that fork, go on and go back, with limits that are no multiple of the steps between two looks."""

    def wide(root):
        (first,) = yield [Expand(root.id, (1, 2, 3, 4, 5), WILD, 13, frozenset({0}))]
        second = yield [Expand(branch.id, (6, 7), WILD, 1 + index, None) for index, branch in enumerate(first)]
        (again,) = yield [Expand(first[1].id, (8,), WILD, 30, frozenset())]
        return [*first, *(branch for kids in second for branch in kids), *again]

    def trimmed(root):
        (found,) = yield [Expand(root.id, (11, 12, 13), WILD, 40, frozenset(), trims=frozenset({0, 1}))]
        (more,) = yield [Expand(found[2].id, (14,), SamplingParams(temperature=0.0), 9, frozenset())]
        return [*found, *more]

    def stopped(root):
        limit = Limit(generated_tokens=12)  # of both: six steps
        (found,) = yield [Expand(root.id, (21, 22), WILD, 40, frozenset(), limit=limit)]
        return found

    return [wide, trimmed, stopped]


def job_of(model, program, seed: int = 0) -> Job:
    return Job(split_rows(random_inputs(model, length=9 + seed, ratio_id=6, seed=seed), model.config)[0], program)


def run_all(model, tags, programs, steps_per_look: int) -> tuple[list[Job], Engine]:
    config = EngineConfig(
        page_size=4,
        num_pages=400,
        steps_per_look=steps_per_look,
        draft_tokens=0,
        canary=steps_per_look > 1,
        compile=False,
    )
    engine = Engine(model, tags, config=config)
    jobs = [job_of(model, program, seed) for seed, program in enumerate(programs)]
    run(engine, jobs)
    assert [job.error for job in jobs] == [None] * len(jobs)
    assert (engine.pages_in_use, engine.images_in_use) == (0, 0)
    return jobs, engine


def assert_same(found: list[Branch], expected: list[Branch]) -> None:
    for one, other in zip(found, expected, strict=True):
        for name in ("tokens", "length", "tag_state", "tag", "overhang", "finish"):
            assert getattr(one, name) == getattr(other, name), name
        for name in ("logprobs", "sampling_logprobs", "entropies", "certainties"):
            assert getattr(one, name) == pytest.approx(getattr(other, name), abs=1e-4), name


def what_was_used(usage: Usage) -> dict[str, int]:
    """Where the host looks less often, siblings with the same tokens do not share a row for as long."""
    used = asdict(usage)
    del used["seconds"]
    used["decoded_tokens"] += used.pop("shared_tokens")
    return used


@pytest.fixture(scope="module")
def step_by_step(random_model, tags):
    """``step_by_step(chosen)``: the jobs of these searches, at each of whose steps the host looked."""

    @functools.cache
    def jobs(chosen):
        return run_all(random_model, tags, [searches()[index] for index in chosen], 1)[0]

    return jobs


@pytest.mark.parametrize("steps_per_look", [2, 3, 5, 64])
@pytest.mark.parametrize("chosen", [[0], [1], [0, 1], [0, 1, 2]])
def test_how_often_the_host_looks_changes_nothing(random_model, tags, step_by_step, chosen, steps_per_look):
    expected = step_by_step(tuple(chosen))
    found, engine = run_all(random_model, tags, [searches()[index] for index in chosen], steps_per_look)
    assert engine.window.captured  # it was not by single steps
    for one, other in zip(expected, found):
        assert_same(other.result, one.result)
        assert what_was_used(other.usage) == what_was_used(one.usage)
    ends = {branch.finish for job in expected for branch in job.result}
    assert ends >= {Finish.TAG, Finish.LENGTH} or chosen == [1]


@pytest.mark.parametrize("backend", ["cuda"])
@pytest.mark.parametrize("chosen", [[0], [1], [0, 1, 2]])
def test_captured_graphs_draw_the_same(tags, chosen, backend):
    model = build_random_mllama(**TINY_SHAPE, seed=0).to(backend)
    expected, _ = run_all(model, tags, [searches()[index] for index in chosen], 1)
    for steps_per_look in (4, 5):  # the second engine captures on top of what the first has left
        found, engine = run_all(model, tags, [searches()[index] for index in chosen], steps_per_look)
        assert engine.window.captured
        for one, other in zip(expected, found):
            assert_same(other.result, one.result)


@pytest.mark.parametrize("family", ["mllama", *FAMILIES])
def test_noted_steps_done_again_are_the_steps(monkeypatch, tags, family):
    """As graphs: nothing of the values that a step was noted with is in it, whichever rows are alive later."""
    if family == "mllama":
        model = build_random_mllama(**TINY_SHAPE, seed=0)
        inputs = [random_inputs(model, length=9 + seed, ratio_id=6, seed=seed) for seed in range(3)]
    else:
        build, make_inputs = FAMILIES[family]
        model = build(seed=0)
        inputs = [make_inputs(model, length=21 + seed, seed=seed) for seed in range(3)]

    def run_noted(steps_per_look: int, replays: bool) -> tuple[list[Job], Engine]:
        config = EngineConfig(page_size=4, num_pages=400, steps_per_look=steps_per_look, canary=replays)
        engine = Engine(model, tags, config=config)
        engine.runner.replays = replays
        jobs = [Job(split_rows(each, model.config)[0], program) for each, program in zip(inputs, searches())]
        run(engine, jobs)
        assert [job.error for job in jobs] == [None] * len(jobs)
        return jobs, engine

    expected, _ = run_noted(1, False)
    monkeypatch.setattr(runner, "open_recorder", Noting)
    found, engine = run_noted(4, True)
    assert engine.window.captured and engine.runner.replay.captured
    for one, other in zip(expected, found):
        assert_same(other.result, one.result)


def test_what_was_taken_for_later_steps_is_given_back(random_model, tags):
    """A branch that ends in the middle has pages for its own tokens, all but the last."""
    seen: list[Branch] = []

    def program(root):
        (found,) = yield [Expand(root.id, (1, 2, 3, 4), WILD, 60, frozenset({0}))]
        seen.extend(found)
        assert {branch.finish for branch in found} >= {Finish.TAG}
        assert [engine.pool.length(branch.seq) for branch in found] == [branch.length - 1 for branch in found]
        return found

    engine = Engine(random_model, tags, config=EngineConfig(page_size=2, num_pages=400, steps_per_look=16))
    job = job_of(random_model, program)
    run(engine, [job])
    assert job.error is None and seen


def test_too_few_pages_for_several_steps_are_enough_for_one(random_model, tags):
    def program(root):
        (found,) = yield [Expand(root.id, (1, 2), WILD, 12, frozenset())]
        return found

    roomy = Engine(random_model, tags, config=EngineConfig(page_size=1, num_pages=400))
    run(roomy, [expected := job_of(random_model, program)])
    tight = Engine(
        random_model, tags, config=EngineConfig(page_size=1, num_pages=roomy.runner.peak_pages, steps_per_look=64)
    )
    run(tight, [found := job_of(random_model, program)])
    assert found.error is None
    assert_same(found.result, expected.result)


def test_logits_without_a_largest_value_are_an_error(tags):
    """As the sampler tells it where it raises nothing: by token -1."""
    branch = Branch(None, 0, 5)
    slot = Slot(branch, Expand(branch.id, (1,), WILD, 3))
    nothing = Row(-1, 0, -1, 0, 0.0, 0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="logits must have a finite largest value"):
        grow(slot, [nothing], frozenset(), tags)
    assert branch.tokens == []
    run = Run(1, [7, -1, -1], [0] * 3, [-1] * 3, [0] * 3, [-0.5] * 3, [-0.25] * 3, [1.0] * 3, [2.0] * 3)
    with pytest.raises(ValueError, match="others after 1 tokens of a candidate"):
        grow_along(slot, run, frozenset(), tags)
    assert (branch.tokens, branch.logprobs, branch.length) == ([7], [-0.5], 6)


def test_the_same_buffers_serve_other_branches(random_model, tags):
    """Their parameters, seeds and stops are those of the branches that have the rows now."""

    def program(root):
        found = []
        for seed, params in enumerate(
            [WILD, SamplingParams(temperature=0.0), SamplingParams(temperature=0.7, top_k=3)]
        ):
            stops = frozenset({0} if seed else ())
            found += (yield [Expand(root.id, (3 * seed, 3 * seed + 1), params, 14, stops)])[0]
        return found

    engines = [
        Engine(random_model, tags, config=EngineConfig(page_size=4, num_pages=400, steps_per_look=steps))
        for steps in (1, 4)
    ]
    jobs = [job_of(random_model, program) for _ in engines]
    for engine, job in zip(engines, jobs):
        run(engine, [job])
        assert job.error is None
    assert engines[1].window.captured
    assert_same(jobs[1].result, jobs[0].result)


class _Watch(TorchDispatchMode):
    """Notes every operator that meets a tensor on the CPU: an upload, or a wait for a value."""

    def __init__(self):
        super().__init__()
        self.with_host: list[str] = []
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, found)) if isinstance(leaf, torch.Tensor)]
        self.with_host += [str(function)] * any(tensor.device.type == "cpu" for tensor in tensors)
        self.count += 1
        return found


@pytest.mark.parametrize("canary", [False, True])
@pytest.mark.parametrize("prefixes", [0, 2])
@pytest.mark.parametrize("family", ["mllama", *FAMILIES])
def test_a_step_needs_no_host(monkeypatch, tags, family, prefixes, canary):
    """On tensors without data a value cannot be looked at, and what comes from the host is seen: it can be captured."""
    monkeypatch.setattr(backend, "available", lambda op, device_type: ("native",))
    model = build_random_mllama(**TINY_SHAPE, seed=0) if family == "mllama" else FAMILIES[family][0](seed=0)
    view = ModelView(model.to("meta"), EngineConfig(num_pages=32, canary=canary))
    window = Window(view, Recorder(), tags.to("meta"), 4)
    shape = Shape(rows=8, pages=16, segments=4, prefixes=prefixes)
    buffers = StepBuffers(shape, 4, len(tags.tags), view.device, has_trail=canary)
    others = graphs.PassBuffers(shape, view)
    with torch.inference_mode(), _Watch() as watch:
        window.step(buffers)
        graphs.Replay(view, Recorder()).step(others)
    assert watch.with_host == [] and watch.count > 100
    with pytest.raises(RuntimeError), torch.inference_mode():
        buffers.token.tolist()  # or a look would have gone unnoticed
