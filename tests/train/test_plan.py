"""The plan of a run's memory beside what torch's tracker counts of real steps."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers.ranks import run_ranks
from rich.console import Console

from llava_cot.train.config import TrainConfig, load_config
from llava_cot.train.plan import make_plan, parse_gpus, print_plan

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))
from bench_train_memory import SHAPES, in_process, measure_step, write_shape  # noqa: E402

SMALL = (
    dict(
        vocab_size=2000,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        cross_attention_layers=[1, 3],
    ),
    dict(
        SHAPES["124M"][1],
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_global_layers=1,
        intermediate_layers_indices=[0, 1],
        vision_output_dim=192,
    ),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("small")
    write_shape(path, *SMALL)
    return path


def config_of(folder, **settings):
    return TrainConfig(model=str(folder), output=folder / "out", data=folder / "none.jsonl", **settings)


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
def test_the_plan_is_what_the_tracker_counts(folder, ranks, settings):
    config = config_of(folder, batch_size=2 * ranks, rows_per_batch=2, **settings)
    plan = make_plan(config, f"{ranks}x1GB", row_tokens=256, images_per_row=2)
    for found in run_ranks(ranks, measured, config, plan.rows, plan.row_tokens, plan.images_per_row):
        assert plan.memory.total == pytest.approx(found["tracker"], rel=0.05)
        for name, count in found["categories"].items():
            assert plan.memory.highest[name] == pytest.approx(count, abs=0.05 * found["tracker"]), name


def test_a_model_of_100_million_parameters_within_15_percent():
    """Of the tracker's count and of the pages that the process really held."""
    found = in_process("step", "cpu", "float32", "0")
    assert found["planned"] == pytest.approx(found["tracker"], rel=0.15)
    assert found["planned"] == pytest.approx(found["resident"], rel=0.15)


def test_counts_of_each_part(folder):
    plan = make_plan(config_of(folder, freeze=["vision", "projector"]), "1x1GB", row_tokens=64)
    every, trained = map(sum, zip(*plan.parameters.values()))
    assert plan.parameters["head"] == (2000 * 128,) * 2
    assert plan.parameters["embedding"] == (2008 * 128,) * 2
    assert plan.parameters["vision"][1] == plan.parameters["projector"][1] == 0
    assert every - trained == plan.parameters["vision"][0] + plan.parameters["projector"][0]
    assert plan.memory.update["parameters"] == pytest.approx(4 * every, rel=0.01)
    assert plan.memory.update["gradients"] == pytest.approx(4 * trained, rel=0.01)
    assert plan.memory.update["optimizer"] == pytest.approx(8 * trained, rel=0.01)


def test_states_in_8_bits_take_a_quarter(folder):
    whole, small = (
        make_plan(config_of(folder, optimizer={"name": name}), "1x1GB", row_tokens=64).memory.update["optimizer"]
        for name in ("adamw", "adamw8bit")
    )
    assert small == pytest.approx(whole / 4, rel=0.1)


def test_adapters_alone_have_gradients(folder):
    plan = make_plan(config_of(folder, lora={"r": 2}), "2x1GB", row_tokens=64)
    assert 0 < plan.memory.update["gradients"] < plan.memory.update["parameters"] / 10


def test_a_reward_model_has_no_vocabulary_to_score(folder):
    plan = make_plan(config_of(folder, objective="reward"), "1x1GB", row_tokens=64)
    assert plan.logits_bytes == 0
    assert plan.parameters["head"] == (129, 129)


def test_what_a_micro_batch_is(folder):
    plan = make_plan(config_of(folder, batch_size=8, rows_per_batch=2), "2x1GB", row_tokens=64)
    assert (plan.rows, plan.images_per_row, plan.accumulates) == (2, 1, True)
    assert plan.memory.forward["gradients"] > 0
    plan = make_plan(config_of(folder, batch_size=8, rows_per_batch=8, max_row_tokens=2048), "8x1GB")
    assert (plan.rows, plan.row_tokens, plan.images_per_row, plan.accumulates) == (1, 2048, 2, False)
    assert plan.memory.forward["gradients"] == 0


def test_steps_and_verdicts(folder, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("{}\n" * 100)
    config = config_of(folder, batch_size=10).model_copy(update={"data": data, "eval_fraction": 0.1})
    plan = make_plan(config, "1x80GB", row_tokens=64)
    assert (plan.steps_per_epoch, plan.verdict) == (9, "fits")
    tight, small = (replace(plan, gpu_bytes=int(share * plan.memory.total)) for share in (1.05, 0.9))
    assert (tight.verdict, small.verdict) == ("tight", "does not fit")


def test_the_table_names_its_assumptions(folder):
    console = Console(record=True, width=100)
    print_plan(make_plan(config_of(folder), "4x80GB", row_tokens=64, images_per_row=3), console)
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
