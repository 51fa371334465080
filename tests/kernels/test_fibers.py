"""The host build that stands in for CUDA: it computes what CUDA would, and notices what CUDA would only suffer from."""

import pytest
import torch
from helpers import fibers


def run(name: str, num_threads: int = 64) -> torch.Tensor:
    out = torch.zeros(num_threads, dtype=torch.int64)
    fibers.ops().probe(out, name)
    return out


@pytest.mark.parametrize("num_threads", [32, 96, 1024])
def test_barriers(num_threads):
    assert run("rotate", num_threads).tolist() == [(t + 30) % num_threads for t in range(num_threads)]
    with fibers.order(3):
        assert run("rotate", num_threads).tolist() == [(t + 30) % num_threads for t in range(num_threads)]


def test_a_missing_barrier_shows_when_the_order_changes():
    results = [run("race")]
    for seed in (1, 2):
        with fibers.order(seed):
            results.append(run("race"))
    assert not all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("two_barriers", r"is not reached by every thread \(block \d, thread \d+\)"),
        ("half_a_warp", "a warp function is called by a part of the warp"),
        ("two_functions", "the lanes of a warp call different warp functions"),
        ("overflow", "a kernel wrote past the end of its shared memory"),
    ],
)
def test_what_cuda_leaves_undefined_is_an_error(name, message):
    with pytest.raises(RuntimeError, match=message):
        run(name)
    assert run("returns_early")[:32].all()  # and the next launch is fine


def test_a_thread_that_has_returned_is_not_waited_for():
    assert run("returns_early").tolist() == [1] * 32 + [0] * 32


def test_shuffles_and_votes():
    for warp, lanes in enumerate(run("warp_functions").view(-1, 32).tolist()):
        for lane, value in enumerate(lanes):
            t = 32 * warp + lane
            up, down, total = max(t - 1, 32 * warp), t + 2 if lane < 30 else t, 32 * (32 * warp) + 496
            expected = ((total * 64 + up % 64) * 64 + down % 64) * 64 + (32 * warp + 3) % 64 + (1 << 30)
            assert value == expected


def test_teams_read_their_peers():
    assert run("peers").tolist() == [6000 + 4 * t for t in range(64)]


def test_counters():
    with fibers.counting() as counted:
        run("rotate", 32)
    assert (counted.launches, counted.bytes_read, counted.bytes_written) == (1, 0, 4 * 32 * 8)
