"""Whole runs of the trainer on real files: any number of ranks, kills, resumes, exports."""

import json
import os
import random
import re
import shutil
import signal
import sys
import time
from functools import cache, partial
from pathlib import Path

import pytest
import torch
import yaml
from helpers.random_qwen import build_random_qwen
from helpers.ranks import CONTEXT, Ranks, start_ranks
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from llava_cot.data import shapes
from llava_cot.data.jsonl import write_jsonl
from llava_cot.data.world import write_world
from llava_cot.prompt import build_inputs
from llava_cot.stages import render
from llava_cot.tiny_qwen import tiny_qwen_path
from llava_cot.train.config import load_config
from llava_cot.train.metrics import read_metrics
from llava_cot.train.model import build_model as build_trained
from llava_cot.train.plan import make_plan
from tools.small_world.processor import build_processor
from tools.small_world.untrained import build_config, build_model

STEPS = 4  # of two an epoch
TIMED = {"seconds", "tokens_per_s", "memory_gib"}


def small_config(processor):
    """A layer of each kind, and a self-attention layer on either side of the cross-attention layer."""
    config = build_config(processor)
    config.text_config.num_hidden_layers, config.text_config.cross_attention_layers = 3, [1]
    vision = config.vision_config
    vision.num_hidden_layers, vision.intermediate_layers_indices = 1, [0]
    return config


def mllama():
    processor = build_processor()
    return build_model(processor, seed=0, config=small_config(processor)), processor


def qwen(model_type):
    processor = AutoProcessor.from_pretrained(tiny_qwen_path())
    return build_random_qwen(model_type, processor, std=0.05), processor


UNTRAINED = {
    "mllama": mllama,
    "qwen2_5_vl": partial(qwen, "qwen2_5_vl"),
    "qwen3_vl": partial(qwen, "qwen3_vl"),  # whose embedding and head are tied
}
every_family = pytest.mark.parametrize("place", UNTRAINED, indirect=True)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """The folder of each family, made when it is first asked for, so that tests may change families."""
    return cache(lambda family: make_place(tmp_path_factory.mktemp(family), *UNTRAINED[family]()))


@pytest.fixture
def place(request, places):
    return places(getattr(request, "param", "mllama"))


def make_place(place: Path, model, processor) -> Path:
    """Fill a folder with an untrained model, data with and without images, and a configuration."""
    model.save_pretrained(place / "untrained")
    processor.save_pretrained(place / "untrained")
    write_world(place, range(9))
    rows = [json.loads(line) for line in (place / "train.jsonl").read_text().splitlines()]
    for number in range(3):
        stages = {"SUMMARY": "I will add.", "CAPTION": "none", "REASONING": f"{number} + 1", "CONCLUSION": "so"}
        turns = [{"from": "human", "value": f"{number} + 1?"}, {"from": "gpt", "value": render(stages)}]
        rows.append({"id": f"text-{number}", "image": None, "conversations": turns})
    write_jsonl(rows, place / "train.jsonl")
    settings = {
        "model": str(place / "untrained"),
        "output": str(place / "out"),
        "data": str(place / "train.jsonl"),
        "images": str(place),
        "batch_size": 6,
        "rows_per_batch": 2,
        "epochs": 3,
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


def train_without_end(place: Path, output: str) -> None:
    """A rank of a run that never exports: what kills it is never too late."""
    from llava_cot.train import trainer

    trainer.export = lambda *_: signal.pause()
    train_here(place, output, ())


RANKS = {count: Ranks(count) for count in (1, 2)}


@pytest.fixture(scope="module", autouse=True)
def ranks_end():
    yield
    for ranks in RANKS.values():
        ranks.close()


def run(place: Path, output: str, *overrides: str, ranks: int = 1) -> list[dict[str, float]]:
    """The values of every step, without those that time makes."""
    RANKS[ranks].run(train_here, place, output, overrides)
    return values_of(place / output)


def values_of(folder: Path) -> list[dict[str, float]]:
    return [{name: value for name, value in line.items() if name not in TIMED} for line in read_metrics(folder)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def wait_for_step(folder: Path, step: int, processes) -> None:
    while len(read_metrics(folder)) < step and all(process.is_alive() for process in processes):
        time.sleep(0.005)


@pytest.fixture(scope="module")
def whole(places):
    """Uninterrupted runs of one and of two ranks."""
    place = places("mllama")
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


@every_family
def test_two_ranks_learn_what_one_does_from_packed_rows(place):
    """Of two ranks, one has a batch without images."""
    packing = ("max_row_tokens=300", "rows_per_batch=1")
    one, two = (run(place, f"packed-{ranks}", *packing, ranks=ranks) for ranks in (1, 2))
    assert_same_learning(place, "packed-1", "packed-2", one, two)


def test_replicas_without_activation_checkpoints_learn_the_same(place, whole):
    replicas = run(place, "replicas", "sharding.replicas=2", "activation_checkpointing=false", ranks=2)
    assert_same_learning(place, "whole-1", "replicas", whole[1], replicas)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_killed_run_goes_on_bit_for_bit(place, whole, ranks):
    output, last = f"killed-{ranks}", random.Random(time.time_ns()).randrange(1, STEPS)
    processes = start_ranks(ranks, train_without_end, place, output)
    wait_for_step(place / output, last, processes)
    for process in processes:
        process.kill()
        process.join()
    assert not (place / output / "model").exists()
    assert run(place, output, ranks=ranks) == whole[ranks]
    found = weights(place / output)
    for name, tensor in weights(place / f"whole-{ranks}").items():
        assert torch.equal(found[name], tensor), (name, last)


def torchrun(arguments: list[str], environment: dict[str, str], log: Path) -> None:
    """What torchrun does, in a process that has imported torch; its ranks are processes of their own as ever."""
    from torch.distributed.run import main

    os.environ.update(environment)
    for stream in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    main(arguments)


def test_sigterm_to_torchrun_saves_and_the_same_command_goes_on(place, whole):
    arguments = ["--standalone", "--nproc_per_node", "2"]
    arguments += ["-m", "helpers.patient_train", str(place / "config.yaml"), f"output={place / 'stopped'}"]
    arguments += ["save_every=null"]
    environment = {"OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(place / "cache")}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    process = CONTEXT.Process(target=torchrun, args=(arguments, environment, place / "stopped.log"))
    process.start()
    wait_for_step(place / "stopped", 1, [process])
    process.terminate()
    process.join()
    said = (place / "stopped.log").read_text()
    assert process.exitcode != 0, said
    assert len(read_metrics(place / "stopped")) == 2, said  # the first step, and the one that was told to be the last
    assert (place / "stopped" / "checkpoints" / "step-2").is_dir(), said
    assert run(place, "stopped", "save_every=null", ranks=2) == whole[2]


def test_another_number_of_ranks_goes_on(place, whole):
    """From where the run of two ranks was in the middle."""
    shutil.copytree(place / "whole-2", place / "changed", ignore=shutil.ignore_patterns("model", f"step-{STEPS}"))
    found = run(place, "changed")
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in whole[1]], rel=1e-5)


def greedy_of_trainer(place: Path, output: str, inputs: dict[str, torch.Tensor]) -> list[int]:
    """What the model of a finished run answers, taken from the trainer and not from its export."""
    import datasets
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from transformers import AutoConfig

    from llava_cot.train.trainer import Trainer

    datasets.config.HF_DATASETS_CACHE = place / "cache"
    trainer = Trainer(load_config(place / "config.yaml", [f"output={place / output}"]), torch.device("cpu"))
    trainer.checkpoints.load(STEPS, trainer.root, trainer.optimizer, trainer.scheduler)
    state = get_model_state_dict(trainer.root, options=StateDictOptions(full_state_dict=True))
    model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(place / "untrained"))
    model.load_state_dict({name.removeprefix("model."): tensor for name, tensor in state.items()})
    return model.eval().generate(**inputs, max_new_tokens=24, do_sample=False)[0].tolist()


@every_family
def test_the_export_answers_as_the_trainer(place):
    if not (place / "whole-2").exists():
        run(place, "whole-2", ranks=2)
    folder = place / "whole-2" / "model"
    processor, model = AutoProcessor.from_pretrained(folder), AutoModelForImageTextToText.from_pretrained(folder)
    sample = shapes.sample(804_000)
    inputs = {name: tensor for name, tensor in build_inputs(processor, sample.image, sample.question, "one").items()}
    (expected,) = RANKS[1].run(greedy_of_trainer, place, "whole-2", inputs)
    assert model.generate(**inputs, max_new_tokens=24, do_sample=False)[0].tolist() == expected
    provenance = json.loads((folder / "training.json").read_text())
    assert provenance["config"]["batch_size"] == 6 and provenance["world_size"] == 2


def changed_weights(place: Path, output: str) -> dict[str, torch.Tensor]:
    """What a run added to each weight that it changed. Its export has the weights that the model had before it."""
    before, after = load_file(place / "untrained" / "model.safetensors"), weights(place / output)
    assert before.keys() == after.keys()
    return {name: after[name] - before[name] for name in before if not torch.equal(before[name], after[name])}


FROZEN = {  # the family, the parts, and the names of the weights that are left to train
    "mllama": ("mllama", "[vision, language]", r".*(layers\.1\.|projector)"),  # layer 1 is the cross-attention layer
    "projector": ("qwen2_5_vl", "[vision, language]", r".*visual\.merger"),
    "language": ("qwen2_5_vl", "[vision, projector]", r"(?!.*visual)"),
    "vision": ("qwen3_vl", "[projector, language]", r".*visual\.(?!merger|deepstack)"),
}


@pytest.mark.parametrize("place, parts, trained", FROZEN.values(), ids=FROZEN, indirect=["place"])
def test_held_out_losses_and_frozen_parts(place, parts, trained):
    output = f"frozen-{parts}"
    values = run(place, output, "max_steps=2", "eval_fraction=0.25", "eval_every=1", f"freeze={parts}")
    assert {"eval/loss", "eval/loss/SUMMARY", "eval/loss/CONCLUSION"} <= set(values[0])
    assert values[0]["eval/loss"] > values[1]["eval/loss"]
    changed = changed_weights(place, output)
    assert changed and all(re.match(trained, name) for name in changed), changed.keys()


@every_family
def test_adapters_are_merged_into_the_export(place):
    values = run(place, "lora", "lora={r: 4, alpha: 8}", "optimizer.lr=1e-2")
    assert values[-1]["loss"] < values[0]["loss"]
    changed = changed_weights(place, "lora")
    assert changed and all(name.split(".")[-2].endswith("_proj") for name in changed)
    first = re.compile(r"(?!.*vision).*layers\.0\.self_attn\.q_proj\.weight")  # of the language model
    (update,) = (change for name, change in changed.items() if first.fullmatch(name))
    assert torch.linalg.matrix_rank(update, atol=1e-4) <= 4


def refused(place: Path, output: str, *overrides: str) -> str:
    with pytest.raises(AssertionError) as failure:
        run(place, output, *overrides)
    return str(failure.value)


def test_a_run_goes_on_with_its_own_data_and_settings_only(place, whole):
    before = values_of(place / "whole-1")
    message = refused(place, "whole-1", "seed=1")
    assert "output must be new or go on with the same seed" in message
    assert values_of(place / "whole-1") == before


def test_bad_rows_are_named(place):
    write_jsonl([{"id": "1", "image": "nowhere.png", "conversations": []}], place / "bad.jsonl")
    assert "row 1 of" in refused(place, "bad", f"data={place / 'bad.jsonl'}")


@pytest.mark.parametrize("place", ["qwen2_5_vl"], indirect=True)
def test_a_reward_model_must_be_of_its_family(place):
    message = "model must be a mllama to be trained as a reward model, got model_type 'qwen2_5_vl'"
    with pytest.raises(ValueError, match=message):
        build_trained(load_config(place / "config.yaml", ["objective=reward"]), empty=True)


@pytest.mark.parametrize("place", ["qwen2_5_vl"], indirect=True)
def test_what_reads_values_cannot_be_planned(place):
    with pytest.raises(ValueError, match="must be of a family whose steps read no values, got Qwen2_5_VLFor"):
        make_plan(load_config(place / "config.yaml"), "1x80GB")
