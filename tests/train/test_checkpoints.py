import importlib.util
import os
import random
import re
import signal
import threading
import time
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers.ranks import Ranks, run_ranks, start_ranks
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from llava_cot.train.checkpoints import Checkpoints


class Net(nn.Module):
    """Everything a shard can be: frozen, of one element, of odd size, under a wrapper, never used, and a buffer."""

    def __init__(self, width=7):
        super().__init__()
        self.first = nn.Linear(8, width)
        self.block = checkpoint_wrapper(nn.Sequential(nn.Linear(width, 5), nn.Dropout(0.3), nn.Tanh(), nn.Linear(5, 3)))
        self.gate = nn.Parameter(torch.ones(1))
        self.unused = nn.Parameter(torch.ones(4))
        self.register_buffer("calls", torch.zeros(()))
        self.first.weight.requires_grad_(False)

    def forward(self, x):
        self.calls += 1
        return self.block(self.first(x)) * self.gate


def build(seed, width=7):
    torch.manual_seed(seed)
    net = Net(width)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for part in (net.first, net.block, net):
        fully_shard(part, mp_policy=policy)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2, fused=True)
    return net, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))


def seed_all(seed):
    torch.manual_seed(seed), random.seed(seed), np.random.seed(seed)


def train(net, optimizer, scheduler, steps=3):
    """Steps on inputs drawn from every generator a rank has."""
    losses = []
    for _ in range(steps):
        x = torch.randn(4, 8) + random.random() + np.random.rand()
        loss = net(x).square().mean()
        loss.backward()
        optimizer.step(), scheduler.step(), optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def whole(net, optimizer):
    """Full tensors by name, of the net and of the optimizer; its groups."""

    def full(value):
        return value.full_tensor().clone() if isinstance(value, DTensor) else value.clone()

    state = get_optimizer_state_dict(net, optimizer)
    moments = {f"{name}.{key}": full(v) for name, values in state["state"].items() for key, v in values.items()}
    return {name: full(v) for name, v in net.state_dict().items()} | moments, state["param_groups"]


def assert_equal(got, expected):
    (got, groups), (expected, expected_groups) = got, expected
    assert groups == expected_groups
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert value.dtype == got[name].dtype and torch.equal(value, got[name]), name


def save_and_go_on(folder):
    trained = build(0)
    seed_all(dist.get_rank())
    train(*trained)
    checkpoints = Checkpoints(folder)
    hold = threading.Event()
    checkpoints._thread.submit(hold.wait)  # nothing is written before all has changed
    saved = whole(*trained[:2])
    checkpoints.save(3, *trained, {"tokens": 12, "rank": dist.get_rank()})
    losses = train(*trained)
    hold.set()
    checkpoints.wait()
    return {"saved": saved, "losses": losses, "end": whole(*trained[:2]), "draws": draws()}


def draws():
    return torch.rand(1).item(), random.random(), np.random.rand()


def resume(folder):
    fresh = build(1)
    seed_all(100)
    checkpoints = Checkpoints(folder)
    assert checkpoints.latest() == 3
    before = torch.get_rng_state()
    extra = checkpoints.load(3, *fresh)
    is_rng_kept = torch.equal(before, torch.get_rng_state())
    loaded = whole(*fresh[:2])
    return {
        "extra": extra,
        "saved": loaded,
        "rng_kept": is_rng_kept,
        "lr": fresh[2].get_last_lr(),
        "losses": train(*fresh),
        "end": whole(*fresh[:2]),
        "draws": draws(),
    }


@pytest.fixture(scope="module")
def two():
    """Two ranks."""
    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def saved(two, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    return folder, two.run(save_and_go_on, folder)


def test_resume_is_bit_exact_and_what_changed_after_the_call_is_not_saved(two, saved):
    folder, expected = saved
    for got, want in zip(two.run(resume, folder), expected):
        assert got["extra"] == {"tokens": 12, "rank": 0}
        assert_equal(got["saved"], want["saved"])
        assert got["losses"] == want["losses"]
        assert_equal(got["end"], want["end"])
        assert got["draws"] == want["draws"]
    assert expected[0]["draws"] != expected[1]["draws"]
    names = expected[0]["saved"][0]
    assert "unused" in names and "unused.exp_avg" not in names and "first.weight.exp_avg" not in names
    assert "block.0.weight" in names and "block.0.weight.exp_avg" in names and names["calls"] == 3


@pytest.mark.parametrize("world_size", [1, 3])
def test_another_number_of_ranks_loads_the_same_and_keeps_its_random_states(saved, world_size):
    folder, expected = saved
    for got in run_ranks(world_size, resume, folder):
        assert_equal(got["saved"], expected[0]["saved"])
        assert got["lr"] == [1e-2 / 4] and got["rng_kept"]


def housekeeping(folder):
    rank = dist.get_rank()
    _, optimizer, scheduler = trained = build(0)
    if rank == 0:
        (folder / ".step-7.part").mkdir(parents=True)
        (folder / ".step-7.part" / "__0_0.distcp").write_bytes(b"half")
        (folder / "step-notes").mkdir()
    dist.barrier()
    checkpoints = Checkpoints(folder, keep=2, asynchronous=False)
    assert checkpoints.latest() is None
    assert not (folder / ".step-7.part").exists()

    # Before the first step: nothing is made of the optimizer's state that a later step would count.
    checkpoints.save(0, *trained, {})
    assert not optimizer.state
    train(*trained, steps=1)
    checkpoints.load(0, *trained)
    assert not optimizer.state
    assert scheduler.last_epoch == 0

    for step in (5, 10, 200):
        checkpoints.save(step, *trained, {"step": step})
    dist.barrier()
    assert checkpoints._steps() == [10, 200] and checkpoints.latest() == 200
    checkpoints.save(200, *trained, {"step": "again"})
    assert checkpoints.load(200, *trained) == {"step": "again"}
    checkpoints.save(50, *trained, {})  # a run that went back: what is newer stays
    assert checkpoints._steps() == [10, 50, 200]
    with pytest.raises(ValueError, match=rf"step must be one of \[10, 50, 200\], .*{folder.name}, got 5$"):
        checkpoints.load(5, *trained)

    other = build(0, width=9)
    with pytest.raises(ValueError, match=r"step-200 does not fit this run: rank 0: .*[Ss]ize mismatch"):
        checkpoints.load(200, *other)

    # An error while writing on one rank is raised on all, by wait or by the next save, and leaves what was there.
    late = Checkpoints(folder)
    if rank == 0:
        (folder / ".step-300.part").write_text("in the way")
    dist.barrier()
    late.save(300, *trained, {})
    with pytest.raises(OSError, match=r"step-300 could not be written: rank 0: .*File exists"):
        late.save(301, *trained, {})
    late.wait()
    assert late.latest() == 200
    late.save(302, *trained, {})
    late.wait()
    assert late.latest() == 302
    return sorted(path.name for path in folder.iterdir())


def test_housekeeping(two, tmp_path):
    for names in two.run(housekeeping, tmp_path / "checkpoints"):
        assert names == [".step-300.part", "step-200", "step-302", "step-notes"]


def test_keep_must_be_positive(tmp_path):
    with pytest.raises(ValueError, match=r"^keep must be >= 1, got 0$"):
        Checkpoints(tmp_path, keep=0)


def save_for_ever(folder):
    net, optimizer, _ = trained = build(0, width=300_000)  # about 100 MB
    checkpoints = Checkpoints(folder)
    start = checkpoints.latest() or 0
    if start:
        checkpoints.load(start, *trained)
    else:
        train(*trained, steps=1)
    for step in count(start + 1):
        fill(net, optimizer, step)
        checkpoints.save(step, *trained, {"step": step})


@torch.no_grad()
def fill(net, optimizer, value):
    for parameter in net.parameters():
        parameter.fill_(value)
    for state in optimizer.state.values():
        state["exp_avg"].fill_(value), state["exp_avg_sq"].fill_(value)


def check_whole(folder):
    net, optimizer, _ = trained = build(0, width=300_000)
    checkpoints = Checkpoints(folder)
    dist.barrier()
    for step in checkpoints._steps():
        assert checkpoints.load(step, *trained) == {"step": step}
        for parameter in net.parameters():
            assert (parameter.to_local() == step).all()
        for state in optimizer.state.values():
            assert (state["exp_avg"].to_local() == step).all() and (state["exp_avg_sq"].to_local() == step).all()
    return checkpoints._steps(), sorted(path.name for path in folder.iterdir())


def test_a_kill_in_the_middle_of_a_save_leaves_whole_checkpoints(two, tmp_path):
    rng = random.Random(0)
    halves, last = 0, 0
    kills = 0
    while kills < 3 or not halves:  # until one has hit a save
        processes = start_ranks(2, save_for_ever, tmp_path)
        wait_for(
            lambda last=last: len(whole_steps(tmp_path) - set(range(last + 1))) >= 1 and parts(tmp_path), processes
        )
        time.sleep(rng.random() * 0.3)
        for process in processes:
            os.kill(process.pid, signal.SIGKILL)
        for process in processes:
            process.join()
        halves += bool(parts(tmp_path))
        kills += 1
        last = max(whole_steps(tmp_path))
    (steps, names), other = two.run(check_whole, tmp_path)
    assert (steps, names) == other
    assert names == sorted(f"step-{step}" for step in steps) and max(steps) == last >= 3


def wait_for(condition, processes):
    while not condition():
        assert all(process.is_alive() for process in processes)
        time.sleep(0.005)


def whole_steps(folder: Path):
    return {int(match[1]) for path in folder.iterdir() if (match := re.fullmatch(r"step-(\d+)", path.name))}


def parts(folder: Path):
    return list(folder.glob(".step-*.part"))


def in_8_bits(folder):
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # compiling takes longer than the test
    from torchao.optim import AdamW8bit

    def build(seed):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 128))
        for part in (net[0], net[2], net):
            fully_shard(part)
        optimizer = AdamW8bit(net.parameters(), lr=1e-2)
        return net, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))

    def train(net, optimizer, scheduler):
        for _ in range(2):
            net(torch.randn(4, 64)).square().mean().backward()
            optimizer.step(), scheduler.step(), optimizer.zero_grad()

    def parts(net, optimizer):
        found = {name: value.to_local().clone() for name, value in net.state_dict().items()}
        for index, state in enumerate(optimizer.state.values()):
            for key, value in state.items():
                value = value.to_local() if isinstance(value, DTensor) else value
                for name in ("codes", "scale") if hasattr(value, "codes") else ():
                    found[f"{index}.{key}.{name}"] = getattr(value, name).clone()
        return found

    def same(one, other):
        return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)

    trained, fresh = build(0), build(1)
    train(*trained)
    at_save = parts(*trained[:2])
    assert "0.exp_avg.codes" in at_save
    checkpoints = Checkpoints(folder)
    hold = threading.Event()
    checkpoints._thread.submit(hold.wait)
    checkpoints.save(2, *trained, {})
    train(*trained)
    hold.set()
    checkpoints.load(2, *fresh)
    assert same(parts(*fresh[:2]), at_save)
    train(*fresh)
    assert same(parts(*fresh[:2]), parts(*trained[:2]))


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
def test_moments_in_8_bits(tmp_path):
    run_ranks(2, in_8_bits, tmp_path)
