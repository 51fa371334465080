"""What a configuration may say, and how it is refused."""

import re

import pytest
import yaml

from llava_cot.train.config import TrainConfig, load_config
from llava_cot.train.schedule import learning_rate

REQUIRED = {"model": "m", "output": "out", "data": "train.jsonl"}


@pytest.fixture
def load(tmp_path):
    def load(*overrides, **settings):
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(REQUIRED | settings))
        return load_config(path, list(overrides))

    return load


@pytest.mark.parametrize(
    "name", ["llava_cot_11b", "llava_cot_11b_published", "tiny", "tiny_dpo", "tiny_reward", "ablation", "ablation_base"]
)
def test_shipped_configurations_are_valid(name):
    assert isinstance(load_config(f"configs/{name}.yaml"), TrainConfig)


def test_overrides_are_yaml_and_reach_nested_settings(load):
    config = load("optimizer.lr=3e-4", "freeze=[vision, projector]", "eval_every=10", "lora={r: 2}")
    assert (config.optimizer.lr, config.freeze, config.eval_every) == (3e-4, ("vision", "projector"), 10)
    assert config.lora.r == 2 and config.optimizer.clip_norm == 1.0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lr=0", "optimizer.lr: Input should be greater than 0, got 0"),
        ("optimizer.lrr=1", "optimizer.lrr: Extra inputs are not permitted, got 1"),
        ("freeze=[visoin]", "freeze.0: Input should be 'vision', 'projector', 'language' or 'cross', got 'visoin'"),
        ("precision.params=bfloat16", "precision.params must be float32 at optimizer.lr=1e-05, got bfloat16"),
        ("stage_weights={SUMARY: 2}", "stage_weights must name stages"),
        ("optimizer.name=adamw_stochastic", "precision.params must be bfloat16 with adamw_stochastic, got float32"),
        ("epochs", "an override must be key=value, got 'epochs'"),
        ("model.name=x", "an override must name a setting, got 'model.name=x'"),
    ],
)
def test_bad_settings_are_named(load, override, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load(override)


def test_what_loses_updates_can_be_asked_for(load):
    assert load("precision.params=bfloat16", "precision.allow_lost_updates=true").precision.params == "bfloat16"
    assert load("precision.params=bfloat16", "optimizer.lr=1e-4").precision.params == "bfloat16"


def test_learning_rates(load):
    cosine = learning_rate(load("schedule={warmup_steps: 4, min_ratio: 0.1}").schedule, 104, 52)
    assert [cosine(step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert cosine(4) == 1.0 and cosine(54) == pytest.approx(0.55) and cosine(104) == cosine(200) == pytest.approx(0.1)
    step = learning_rate(load("schedule={name: step, gamma: 0.85}").schedule, 9300, 3100)
    assert [step(at) for at in (0, 3099, 3100, 6200)] == [1, 1, 0.85, 0.85**2]
    assert learning_rate(load("schedule.name=constant").schedule, 10, 5)(9) == 1.0


@pytest.mark.parametrize(
    "text", ["seed: 1\nseed: 2\n", "optimizer: {lr: 1e-5, lr: 1e-4}\n", "optimizer:\n  lr: 1\n  lr: 2\n"], ids=repr
)
def test_a_key_stands_once(tmp_path, text):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(REQUIRED) + text)
    with pytest.raises(ValueError, match=r"config must be YAML, got '.*config.yaml': '(seed|lr)' stands twice"):
        load_config(tmp_path / "config.yaml")
