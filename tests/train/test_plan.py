"""The plan of a run's memory beside what torch's tracker counts of real steps."""

import ctypes
import json
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers.ranks import CONTEXT, Ranks
from rich.console import Console

from llava_cot.train.config import TrainConfig, load_config
from llava_cot.train.plan import make_plan, parse_gpus, print_plan

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))
import bench_train_memory  # noqa: E402
from bench_train_memory import SHAPES, measure_step, write_shape  # noqa: E402

SMALL = (  # one layer of each kind: a plan's time is that of its operations, of whatever size
    dict(
        vocab_size=2000,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        cross_attention_layers=[1],
    ),
    dict(
        SHAPES["124M"][1],
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_global_layers=1,
        intermediate_layers_indices=[0],
        vision_output_dim=128,
    ),
)


BIG = (
    dict(
        SHAPES["124M"][0],
        vocab_size=16000,
        hidden_size=512,
        intermediate_size=1365,
        num_hidden_layers=3,
        num_attention_heads=8,
        cross_attention_layers=[1],
    ),
    dict(
        SHAPES["124M"][1],
        num_hidden_layers=1,
        num_global_layers=1,
        intermediate_layers_indices=[0],
        vision_output_dim=640,
    ),
)
M_MMAP_THRESHOLD = -3  # of malloc.h


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("small")
    write_shape(path, *SMALL)
    return path


def config_of(folder, **settings):
    return TrainConfig(model=str(folder), output=folder / "out", data=folder / "none.jsonl", **settings)


@pytest.fixture(scope="module")
def processes():
    """By the number of ranks; started when they are first needed."""
    ranks = {count: Ranks(count) for count in (1, 2)}
    yield ranks
    for each in ranks.values():
        each.close()


def measured(config, rows, row_tokens, images):
    torch.set_num_threads(1)
    return measure_step(config, torch.device("cpu"), rows, row_tokens, images)


@pytest.mark.parametrize(
    ("ranks", "settings"),
    [
        (1, {"activation_checkpointing": False}),
        (1, {"precision": {"compute": "float32"}}),
        (2, {}),
        (2, {"freeze": ["vision", "language"], "activation_checkpointing": False}),
        (2, {"sharding": {"replicas": 2}}),
        (2, {"precision": {"params": "bfloat16", "reduce": "bfloat16", "allow_lost_updates": True}}),
        (1, {"precision": {"params": "bfloat16"}, "optimizer": {"name": "adamw_stochastic"}}),
    ],
)
def test_the_plan_is_what_the_tracker_counts(folder, processes, ranks, settings):
    config = config_of(folder, batch_size=2 * ranks, rows_per_batch=2, **settings)
    plan = make_plan(config, f"{ranks}x1GB", row_tokens=256, images_per_row=2)
    for found in processes[ranks].run(measured, config, plan.rows, plan.row_tokens, plan.images_per_row):
        assert plan.memory.total == pytest.approx(found["tracker"], rel=0.05)
        for name, count in found["categories"].items():
            assert plan.memory.highest[name] == pytest.approx(count, abs=0.05 * found["tracker"]), name


def bench_step(file):
    """What the benchmark's own process does on the CPU, with a smaller model."""
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 65536)  # as ``in_process`` does: resident memory is live memory
    bench_train_memory.SHAPES["28M"] = BIG
    bench_train_memory.STEPS["cpu"] = ("28M", 2, 320, 1)
    sys.argv = ["bench_train_memory.py", "--device", "cpu", "--one", "step", "cpu", "float32", "0"]
    with file.open("w") as out, redirect_stdout(out):
        bench_train_memory.main()


def test_a_model_of_28_million_parameters_within_15_percent(tmp_path):
    """Of the tracker's count and of the pages that the process really held: activations are a fifth of them."""
    process = CONTEXT.Process(target=bench_step, args=(tmp_path / "found.json",))
    process.start()
    process.join()
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["planned_categories"]["activations"] > 0.17 * found["planned"]  # a plan without them would be seen
    assert found["planned"] == pytest.approx(found["tracker"], rel=0.15)
    assert found["planned"] == pytest.approx(found["resident"], rel=0.15)


@pytest.fixture(scope="module")
def frozen(folder, tmp_path_factory):
    """The plan of a run on 100 rows that are there, without gradients of what sees the image."""
    data = tmp_path_factory.mktemp("data") / "data.jsonl"
    data.write_text("{}\n" * 100)
    config = config_of(folder, batch_size=10, freeze=["vision", "projector"])
    return make_plan(config.model_copy(update={"data": data, "eval_fraction": 0.1}), "1x80GB", row_tokens=64)


def test_counts_of_each_part(frozen):
    every, trained = map(sum, zip(*frozen.parameters.values()))
    assert frozen.parameters["head"] == (2000 * 128,) * 2
    assert frozen.parameters["embedding"] == (2008 * 128,) * 2
    assert frozen.parameters["vision"][1] == frozen.parameters["projector"][1] == 0
    assert every - trained == frozen.parameters["vision"][0] + frozen.parameters["projector"][0]
    assert frozen.memory.update["parameters"] == pytest.approx(4 * every, rel=0.01)
    assert frozen.memory.update["gradients"] == pytest.approx(4 * trained, rel=0.01)
    assert frozen.memory.update["optimizer"] == pytest.approx(8 * trained, rel=0.01)


def test_states_in_8_bits_take_a_quarter(folder, frozen):
    config = config_of(folder, freeze=["vision", "projector"], optimizer={"name": "adamw8bit"})
    small = make_plan(config, "1x1GB", row_tokens=64).memory.update["optimizer"]
    assert small == pytest.approx(frozen.memory.update["optimizer"] / 4, rel=0.1)


def test_a_reward_model_has_no_vocabulary_to_score(folder):
    plan = make_plan(config_of(folder, objective="reward"), "1x1GB", row_tokens=64)
    assert plan.logits_bytes == 0
    assert plan.parameters["head"] == (129, 129)


def test_what_a_micro_batch_is(folder):
    """And that adapters alone have gradients."""
    plan = make_plan(config_of(folder, batch_size=8, rows_per_batch=2, lora={"r": 2}), "2x1GB", row_tokens=64)
    assert (plan.rows, plan.images_per_row, plan.accumulates) == (2, 1, True)
    assert plan.memory.forward["gradients"] > 0
    assert 0 < plan.memory.update["gradients"] < plan.memory.update["parameters"] / 10
    plan = make_plan(config_of(folder, batch_size=8, rows_per_batch=8, max_row_tokens=2048), "8x1GB")
    assert (plan.rows, plan.row_tokens, plan.images_per_row, plan.accumulates) == (1, 2048, 2, False)
    assert plan.memory.forward["gradients"] == 0


def test_steps_and_verdicts(frozen):
    assert (frozen.steps_per_epoch, frozen.verdict) == (9, "fits")
    tight, small = (replace(frozen, gpu_bytes=int(share * frozen.memory.total)) for share in (1.05, 0.9))
    assert (tight.verdict, small.verdict) == ("tight", "does not fit")


def test_the_table_names_its_assumptions(frozen):
    console = Console(record=True, width=100)
    print_plan(replace(frozen, gpus=4, images_per_row=3), console)
    text = console.export_text()
    assert "4 GPUs: rows=4 of 64 tokens, all of them supervised, images_per_row=3" in text
    for word in ("self-attention layers", "optimizer (shard)", "end of forward", "fits"):
        assert word in text


def test_bad_input(folder, tmp_path):
    with pytest.raises(ValueError, match=r"gpus must be COUNTxSIZEGB, e\.g\. 8x80GB, got '8'"):
        parse_gpus("8")
    assert parse_gpus("2x79.5 gb") == (2, 79_500_000_000)
    with pytest.raises(ValueError, match="row_tokens must be >= 1, got 0"):
        make_plan(config_of(folder), "1x1GB", row_tokens=0)
    with pytest.raises(ValueError, match="images_per_row must be >= 1, got 0"):
        make_plan(config_of(folder), "1x1GB", images_per_row=0)
    with pytest.raises(ValueError, match=r"gpus must be a multiple of sharding\.replicas=2, got '3x1GB'"):
        make_plan(config_of(folder, sharding={"replicas": 2}), "3x1GB")
    with pytest.raises(ValueError, match="model must be a folder or a hub name that can be reached"):
        make_plan(config_of(tmp_path / "nowhere"), "1x1GB")
    assert not dist.is_initialized()


def test_the_papers_model_has_its_parameters():
    """Counted, not simulated: 80 layers take half a minute."""
    from llava_cot.train.model import build_model
    from llava_cot.train.plan import count_parameters

    settings = load_config(ROOT / "configs/llava_cot_11b.yaml", [f"model={ROOT / 'configs/llama_3_2_11b_vision'}"])
    counts = count_parameters(build_model(settings, empty=True))
    assert sum(every for every, _ in counts.values()) == 10_670_220_835
