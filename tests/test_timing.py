"""What the benchmarks share: what waits is never captured, and figures are on disk as soon as they are there."""

import json
import sys
from pathlib import Path

import pytest
import torch
from helpers.fake_cuda import FakeCuda, Waits

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import bench_decode
import timing

from llava_cot.engine import graphs


@pytest.fixture
def cuda(monkeypatch):
    """A call that waits raises, as CUDA has it: in a capture always, elsewhere where PyTorch is told to."""
    fake, mode = FakeCuda(monkeypatch), ["default"]
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: mode[0])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda new: mode.__setitem__(0, new))
    monkeypatch.setattr(timing, "CudaRecorder", lambda device: graphs.CudaRecorder(torch.device("cpu", 0)))
    graphs._capture_stream.cache_clear()

    def wait():
        if fake.into is not None:
            raise Waits
        if mode[0] == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    fake.wait, fake.mode = wait, mode
    yield fake
    graphs._capture_stream.cache_clear()


def test_what_waits_is_timed_last_and_never_captured(cuda, capsys):
    x = torch.zeros(3)
    calls = {
        "waits": cuda.wait,
        "adds": lambda: x.add_(1),
        "waits at first": lambda: cuda.wait() if x[0] == 0 else x.add_(1),
    }
    x.add_(1)
    graphs, plain = timing._captured(calls)
    assert [*graphs] == ["adds", "waits at first"] and plain == {"waits": cuda.wait}
    assert cuda.captures == 3 and cuda.into is None and cuda.mode == ["default"]  # with the empty one
    before = x.clone()
    graphs["adds"]()
    assert torch.equal(x, before + 1)
    assert "waits waits for the device" in capsys.readouterr().out


def test_another_error_is_no_wait(cuda):
    with pytest.raises(IndexError, match="out of range"):
        timing._captured({"broken": lambda: torch.zeros(3).select(0, 7)})
    assert cuda.mode == ["default"] and cuda.captures == 1


def test_results_are_whole_after_every_row(tmp_path):
    path = tmp_path / "found.json"
    results = timing.Results(path, machine="one")
    assert json.loads(path.read_text()) == {"machine": "one", "rows": []}
    for count in range(1, 4):
        results.add({"case": count, "path": path})
        assert [row["case"] for row in json.loads(path.read_text())["rows"]] == [*range(1, count + 1)]
    with pytest.raises(TypeError):
        results.add({object(): 1})  # no key of a JSON object
    assert len(json.loads(path.read_text())["rows"]) == 3 and [*tmp_path.iterdir()] == [path]


def test_without_a_gpu_one_line_says_so(capsys):
    timing.check_device("cpu")
    if torch.cuda.is_available():
        return timing.check_device("cuda")
    with pytest.raises(SystemExit) as stopped:
        timing.check_device("cuda")
    assert stopped.value.code == timing.NEEDS_GPU == 77
    assert capsys.readouterr().out.count("\n") == 1


# ---- bench_decode ----


@pytest.fixture
def decode(monkeypatch, tmp_path):
    """``decode(options...)``: the rows that the benchmark leaves behind on the tiny model."""
    monkeypatch.setattr(bench_decode, "copy_bandwidth", lambda device: 1e10)

    def run(*options):
        path = tmp_path / "decode.json"
        model = str(bench_decode.ROOT / "llava_cot/tiny")
        command = ["bench_decode", "--model", model, "--device", "cpu", "--tiles", "1", "--json", str(path), *options]
        monkeypatch.setattr(sys, "argv", command)
        try:
            bench_decode.main()
        finally:
            rows = json.loads(path.read_text())["rows"]
        return rows

    return run


SHORT = ("--text", "20", "--tokens", "9", "--candidates", "1", "2")


def test_a_peer_that_fails_takes_no_figures_with_it(monkeypatch, decode, capsys):
    def generate_step(model, inputs, n, tokens):
        if n == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 42 GiB")
        return 2.0

    monkeypatch.setattr(bench_decode, "generate_step", generate_step)
    first, second = decode(*SHORT)
    assert first["ms"] and first["static_ms"] and first["generate_ms"] is None and first["errors"] == ["out of memory"]
    assert second["ms"] and second["static_ms"] and second["generate_ms"] == 2.0 and second["errors"] == []
    assert "out of memory" in capsys.readouterr().out


def test_generate_is_asked_for_so_many_candidates_at_most(decode):
    rows = decode(*SHORT, "--generate-candidates", "1")
    assert [bool(row["generate_ms"]) for row in rows] == [True, False]


def test_an_engine_that_fails_is_an_error_at_the_end(monkeypatch, decode):
    monkeypatch.setattr(bench_decode, "engine_step", lambda *_: 1 / 0)
    monkeypatch.setattr(bench_decode, "generate_step", lambda *_: 2.0)
    with pytest.raises(SystemExit, match="1"):
        decode(*SHORT)


def test_few_steps_are_profiled(decode):
    for row in decode("--text", "20", "--candidates", "1", "2", "--profile"):
        assert row["profile"]["steps"] == bench_decode.PROFILED_STEPS == 8
        assert row["profile"]["kernels"] == 0  # which a CPU has none of
