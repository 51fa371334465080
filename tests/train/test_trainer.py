"""Whole runs of the trainer on real files: any number of ranks, kills, resumes, exports."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from helpers.ranks import run_ranks, start_ranks
from safetensors.torch import load_file

from llava_cot.data.jsonl import write_jsonl
from llava_cot.data.world import write_world
from llava_cot.stages import render
from llava_cot.train.config import load_config
from llava_cot.train.metrics import read_metrics
from llava_cot.train.tiny import build_model, build_processor

STEPS = 6
TIMED = {"seconds", "tokens_per_s", "memory_gib"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with an untrained model, data with and without images, and a configuration."""
    place = tmp_path_factory.mktemp("run")
    processor = build_processor()
    build_model(processor, seed=0).save_pretrained(place / "untrained")
    processor.save_pretrained(place / "untrained")
    write_world(place, range(24))
    rows = [json.loads(line) for line in (place / "train.jsonl").read_text().splitlines()]
    for number in range(8):
        stages = {"SUMMARY": "I will add.", "CAPTION": "none", "REASONING": f"{number} + 1", "CONCLUSION": "so"}
        turns = [{"from": "human", "value": f"{number} + 1?"}, {"from": "gpt", "value": render(stages)}]
        rows.append({"id": f"text-{number}", "image": None, "conversations": turns})
    write_jsonl(rows, place / "train.jsonl")
    settings = {
        "model": str(place / "untrained"),
        "output": str(place / "out"),
        "data": str(place / "train.jsonl"),
        "images": str(place),
        "batch_size": 8,
        "rows_per_batch": 2,
        "epochs": 2,
        "max_steps": STEPS,
        "optimizer": {"lr": 1e-3},
        "precision": {"compute": "float32"},
        "device": "cpu",
        "threads": 1,
        "workers": 1,
        "log_every": 1,
        "save_every": 2,
        "export_dtype": "float32",
    }
    (place / "config.yaml").write_text(yaml.safe_dump(settings))
    return place


def train_here(place: Path, output: str, overrides: tuple[str, ...]) -> None:
    """What a rank does; it is in a process group already."""
    import datasets

    from llava_cot.train.trainer import Trainer

    datasets.config.HF_DATASETS_CACHE = place / "cache"
    Trainer(load_config(place / "config.yaml", [f"output={place / output}", *overrides]), torch.device("cpu")).run()


def run(place: Path, output: str, *overrides: str, ranks: int = 1) -> list[dict[str, float]]:
    """The values of every step, without those that time makes."""
    run_ranks(ranks, train_here, place, output, overrides)
    return values_of(place / output)


def values_of(folder: Path) -> list[dict[str, float]]:
    return [{name: value for name, value in line.items() if name not in TIMED} for line in read_metrics(folder)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def wait_for_step(folder: Path, step: int, processes) -> None:
    while len(read_metrics(folder)) < step and all(process.is_alive() for process in processes):
        time.sleep(0.005)


@pytest.fixture(scope="module")
def whole(place):
    """Uninterrupted runs of one and of two ranks."""
    return {ranks: run(place, f"whole-{ranks}", ranks=ranks) for ranks in (1, 2)}


def assert_same_learning(place, one, two, first, second):
    assert [line["step"] for line in first] == list(range(1, STEPS + 1))
    assert first[-1]["loss"] < first[0]["loss"]
    for a, b in zip(first, second, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
    found = weights(place / two)
    for name, tensor in weights(place / one).items():
        # Adam divides by the gradient's own size: where it is rounding alone, so is the step's direction.
        assert (found[name] - tensor).abs().mean() < 1e-5, name


def test_two_ranks_learn_what_one_does(place, whole):
    assert_same_learning(place, "whole-1", "whole-2", whole[1], whole[2])


def test_two_ranks_learn_what_one_does_from_packed_rows(place):
    packing = ("max_row_tokens=300", "rows_per_batch=1")
    one, two = (run(place, f"packed-{ranks}", *packing, ranks=ranks) for ranks in (1, 2))
    assert_same_learning(place, "packed-1", "packed-2", one, two)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_killed_run_goes_on_bit_for_bit(place, whole, ranks):
    output, last = f"killed-{ranks}", random.Random(time.time_ns()).randrange(1, STEPS)
    processes = start_ranks(ranks, train_here, place, output, ())
    wait_for_step(place / output, last, processes)
    for process in processes:
        process.kill()
        process.join()
    assert not (place / output / "model").exists()
    assert run(place, output, ranks=ranks) == whole[ranks]
    found = weights(place / output)
    for name, tensor in weights(place / f"whole-{ranks}").items():
        assert torch.equal(found[name], tensor), (name, last)


def test_sigterm_to_torchrun_saves_and_the_same_command_goes_on(place, whole):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "llava_cot.cli", "train", str(place / "config.yaml"), f"output={place / 'stopped'}"]
    command += ["save_every=1000"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(place / "cache")}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not read_metrics(place / "stopped") and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    assert process.returncode != 0, said
    done = len(read_metrics(place / "stopped"))
    assert (place / "stopped" / "checkpoints" / f"step-{done}").is_dir(), said
    assert run(place, "stopped", "save_every=1000", ranks=2) == whole[2]


def test_another_number_of_ranks_goes_on(place, whole):
    run(place, "changed", "max_steps=2", ranks=2)
    found = run(place, "changed")
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in whole[1]], rel=1e-5)
