"""The ablation from end to end on the bundled model: data, training by the command, answers, table."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.ranks import CONTEXT

from llava_cot import tiny_path
from llava_cot.checkpoint import checkpoint_sha256
from llava_cot.stages import render
from tools.small_world import ablation
from tools.small_world.ablation import LAST_SEED, Setting, evaluate, main, run, said

ROOT = Path(__file__).parents[2]
STAGES = {"SUMMARY": "I count.", "CAPTION": "A dog.", "REASONING": "It is one.", "CONCLUSION": "1"}


def setting(overrides=(), **changes) -> Setting:
    numbers = {"steps": 2, "first_question": 720_000, "questions": 3, **changes}
    return Setting.load(tiny_path(), ROOT / "configs/ablation.yaml", ["batch_size=4", *overrides], **numbers)


@pytest.fixture(autouse=True)
def forked(monkeypatch):
    """Workers are forked from a server that has imported torch, instead of importing it each."""
    monkeypatch.setattr(ablation, "get_context", lambda _: CONTEXT)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_from_data_to_table(tmp_path):
    torch.set_num_threads(1)
    file = run(setting(), tmp_path, ["direct with caption"], [1])
    rows = json.loads(file.read_text())["rows"]
    assert {variant: list(runs) for variant, runs in rows.items()} == {"base": ["0"], "direct with caption": ["1"]}
    assert rows["base"]["0"] == evaluate(tiny_path(), range(720_000, 720_003))
    assert rows["base"]["0"]["orders"] == {"SUMMARY CAPTION REASONING CONCLUSION": 3}

    trained = tmp_path / "direct-with-caption-1"
    provenance = json.loads((trained / "model/training.json").read_text())["config"]
    data = [json.loads(line) for line in (trained / "train.jsonl").read_text().splitlines()]
    assert (provenance["batch_size"], provenance["seed"], len(data)) == (8, 1, 16)  # two steps of four questions
    assert data[0]["id"] == "shapes-400008" and (tmp_path / "world-1" / data[0]["image"]).is_file()
    assert checkpoint_sha256(trained / "model") != checkpoint_sha256(tiny_path())

    made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.name != "ablation.json"}
    assert json.loads(run(setting(), tmp_path, ["direct with caption"], [1]).read_text())["rows"] == rows
    assert {path: path.stat().st_mtime_ns for path in made} == made  # nothing was made again
    with pytest.raises(ValueError, match=r"out must be new or have the same setting as .*setting.json', got another"):
        run(setting(steps=3), tmp_path, ["direct with caption"], [1])

    command = [sys.executable, "benchmarks/ablation_report.py", str(tmp_path), "--results", str(tmp_path / "r.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "| direct with caption |" in done.stdout and (tmp_path / "r.json").is_file(), done.stderr


def test_a_failed_training_says_where_to_look(tmp_path):
    with pytest.raises(RuntimeError, match=r"training 'full' with seed 0 ended with \d+, see .*full-0/log.txt"):
        run(setting(["freeze=[vision,projector,language,cross]"]), tmp_path, ["full"], [0])
    assert "freeze" in (tmp_path / "full-0/log.txt").read_text()
    assert (tmp_path / "base-0.json").is_file() and not (tmp_path / "ablation.json").exists()


@pytest.mark.parametrize(
    "text, answer",
    [
        (render(STAGES), "1"),
        ("<CONCLUSION> 7", "7"),
        ("<SUMMARY> a </SUMMARY>\n\n<CONCLUSION> yes </CONCLUSION>\n\n<CAPTION> b </CAPTION>", "yes"),
        ("\n\n".join(STAGES.values()), "1"),
        (" yes\n", "yes"),
        ("", ""),
        ("<SUMMARY> I count. </SUMMARY>", "<SUMMARY> I count. </SUMMARY>"),
    ],
)
def test_what_is_said(text, answer):
    assert said(text) == answer


def test_refused_configurations():
    with pytest.raises(ValueError, match=r"optimizer.lr: Input should be greater than 0, got -1"):
        setting(["optimizer.lr=-1"])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"steps": 0}, "steps must be >= 1, got 0"),
        ({"questions": 0}, "questions must be >= 1, got 0"),
        ({"first_question": 5}, f"first_question must be >= {LAST_SEED}, got 5"),
    ],
)
def test_refused_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        setting(**changes)


def test_seeds_train_on_samples_of_their_own():
    assert setting().training_seeds(0) == range(400_000, 400_008)
    assert setting().training_seeds(1) == range(400_008, 400_016)
    big = setting(["batch_size=32"], steps=600)
    assert big.training_seeds(14).stop <= LAST_SEED
    for seed in (-1, 15):
        with pytest.raises(ValueError, match=rf"seed must be in \[0, 15\), got {seed}"):
            big.training_seeds(seed)


def test_refused_runs(tmp_path, monkeypatch, capsys):
    with pytest.raises(ValueError, match=r"variants must be of \['full', .*\], got \['half'\]"):
        run(setting(), tmp_path, ["half"], [0])
    monkeypatch.setattr("sys.argv", ["ablation", str(tmp_path / "out"), "--base", str(tmp_path / "none")])
    with pytest.raises(SystemExit):
        main()
    assert "base must be a folder with a model, got" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
