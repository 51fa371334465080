"""Captured steps: several engines in a process, captures that fail, and what is evicted."""

import gc
from types import SimpleNamespace

import pytest
import torch
from helpers.fake_cuda import FakeCuda, Waits
from helpers.jobs import Job, run
from helpers.random_mllama import random_inputs

from llava_cot.core import Expand, SamplingParams
from llava_cot.engine import graphs, runner
from llava_cot.engine.config import EngineConfig
from llava_cot.engine.engine import Engine
from llava_cot.engine.graphs import CapturedSteps, CudaRecorder, Recorder, Shape
from llava_cot.prompt import split_rows
from llava_cot_kernels.stage_tags import StageTags

DEVICE = torch.device("cpu", 0)
TAGS = StageTags([b"a", b"</x>"], ["</x>"])


@pytest.fixture
def cuda(monkeypatch):
    """CUDA's rules on the CPU, and every engine captures its steps by them."""
    monkeypatch.setattr(runner, "open_recorder", lambda device: CudaRecorder(DEVICE))
    graphs._capture_stream.cache_clear()
    yield FakeCuda(monkeypatch)
    graphs._capture_stream.cache_clear()


def draw(model, engine: Engine) -> list[list[int]]:
    def program(root):
        (found,) = yield [Expand(root.id, (1, 2, 3), SamplingParams(temperature=1.2), 9, frozenset())]
        (more,) = yield [Expand(found[1].id, (4, 5), SamplingParams(temperature=1.2), 7, frozenset())]
        return [branch.tokens for branch in (*found, *more)]

    job = Job(split_rows(random_inputs(model, length=9, ratio_id=6, seed=0), model.config)[0], program)
    run(engine, [job])
    assert job.error is None
    return job.result


def open_engine(model) -> Engine:
    engine = Engine(model, TAGS, config=EngineConfig(page_size=4, num_pages=100, steps_per_look=4, canary=True))
    engine.runner.replays = True
    return engine


def product(size: int = 3):
    """A step with a product of matrices, and its output."""
    a, out = torch.randn(size, size), torch.zeros(size, size)
    return out, lambda: out.copy_(a @ a)


def test_engines_one_after_another_capture_and_replay(cuda, random_model):
    expected = draw(random_model, Engine(random_model, TAGS, config=EngineConfig(page_size=4, num_pages=100)))
    for _ in range(3):
        engine = open_engine(random_model)
        before = cuda.captures
        assert draw(random_model, engine) == draw(random_model, engine) == expected
        assert cuda.captures >= before + 3 and len(engine.window.captured) >= 2
        del engine
        gc.collect()
        assert cuda.live_graphs == 0 and cuda.pools == {}
    assert len(cuda.with_workspace) == 1  # one stream for all captures


def test_engines_side_by_side_have_pools_of_their_own(cuda, random_model):
    engines = [open_engine(random_model) for _ in range(3)]
    first, *others = [draw(random_model, engine) for engine in engines]
    assert others == [first, first] and len(cuda.pools) == 3
    del engines[0]
    gc.collect()
    assert draw(random_model, engines[0]) == first and len(cuda.pools) == 2


def test_a_pool_without_graphs_is_an_error_by_these_rules(cuda):
    """What the empty graph of a recorder prevents, and a pool that all engines shared ran into."""
    pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()

    def record():
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
            product()[1]()
        return graph

    graph = record()
    del graph
    with pytest.raises(RuntimeError, match="use_count > 0"):
        record()


def test_capturing_goes_on_after_all_graphs_are_gone(cuda):
    recorder = CudaRecorder(DEVICE)
    for _ in range(3):
        out, step = product()
        run = recorder._record(step).replay  # without the run before: cuBLAS takes its workspace from the pool
        expected = out.clone()
        out.zero_()
        run()
        assert torch.equal(out, expected)
        del run
    assert cuda.pools[recorder.pool].workspaces and cuda.live_graphs == 1


def test_a_capture_that_fails_leaves_the_next_one_alone(cuda):
    recorder, current = CudaRecorder(DEVICE), torch.cuda.current_stream()
    calls = []

    def waits():
        calls.append(None)
        if len(calls) == 2:
            raise Waits

    with pytest.raises(RuntimeError, match="during capture"):
        recorder.capture(waits)
    assert cuda.into is None and torch.cuda.current_stream() is current
    with pytest.raises(ZeroDivisionError):
        recorder.capture(lambda: 1 // 0)
    out, step = product()
    run = recorder.capture(step)
    expected = out.clone()
    out.zero_()
    run()
    assert torch.equal(out, expected) and torch.cuda.current_stream() is current


# ---- what is evicted ----


def captured(max_bytes: int, opened: list[int]) -> tuple[CapturedSteps, object]:
    """``get(rows)`` of steps whose buffers have 4 bytes a row, and the rows that were opened."""
    steps = CapturedSteps(DEVICE, Recorder(), max_bytes)

    def get(rows: int):
        def open_buffers():
            opened.append(rows)
            return SimpleNamespace(x=torch.zeros(rows))

        return steps.get(Shape(rows, 1, 1, 0), open_buffers, lambda at: at.x.add_(1))

    return steps, get


def test_the_least_recently_used_step_is_evicted():
    opened: list[int] = []
    steps, get = captured(4 * 6, opened)
    for rows in (1, 2, 3, 1, 2, 3):
        get(rows)
    assert opened == [1, 2, 3] and steps.nbytes == 4 * 6
    get(1)
    get(4)  # 2 and 3 have to go
    assert steps.nbytes == 4 * 5
    for rows in (1, 4, 2):
        get(rows)
    assert opened == [1, 2, 3, 4, 2]


def test_a_step_that_is_too_large_alone_is_kept_while_it_is_used():
    opened: list[int] = []
    steps, get = captured(4, opened)
    for rows in (9, 9, 2, 9):
        buffers, run = get(rows)
        run()
        assert (buffers.x > 0).all() and len(steps) == 1
    assert opened == [9, 2, 9]


def test_evicted_steps_are_captured_again(cuda, random_model):
    engine = open_engine(random_model)
    for steps in (engine.window.captured, engine.runner.replay.captured):
        steps.max_bytes = 0
    expected, first = draw(random_model, engine), cuda.captures
    assert draw(random_model, engine) == expected
    assert cuda.captures > first  # without a bound the second time captures nothing
    assert cuda.live_graphs <= 3  # one of each kind, and the empty one that keeps the pool
