import io
import json
import multiprocessing
import os
import re
import sys
import time
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from llava_cot.train.metrics import Metrics, read_metrics
from llava_cot.train.progress import Progress

EventAccumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator").EventAccumulator


def log_for_ever(folder):
    metrics = Metrics(folder)
    for step in count(1):
        metrics.log(step, {"loss": 1 / step, "loss/CAPTION": 2.0})


def scalars(folder, name):
    """Steps and values as TensorBoard shows them, over all files of the folder."""
    board = EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    return [(event.step, event.value) for event in board.Scalars(name)]


def test_a_resumed_run_has_every_step_once(tmp_path):
    with Metrics(tmp_path / "run") as metrics:
        for step in range(1, 8):
            metrics.log(step, {"loss": float(step), "loss/CAPTION": 0.5})
    time.sleep(1)  # files of TensorBoard are ordered by their second
    with Metrics(tmp_path / "run", resume_from=4) as metrics:
        for step in range(5, 7):
            metrics.log(step, {"loss": -float(step), "lr": 1e-5})
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[3] == {"step": 4, "loss": 4.0, "loss/CAPTION": 0.5}
    assert lines[4] == {"step": 5, "loss": -5.0, "lr": 1e-5}
    assert scalars(tmp_path / "run", "loss") == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, -5.0), (6, -6.0)]
    assert [step for step, _ in scalars(tmp_path / "run", "loss/CAPTION")] == [1, 2, 3, 4]


def test_other_ranks_write_nothing(tmp_path):
    with Metrics(tmp_path / "run", rank=1) as metrics:
        metrics.log(1, {"loss": 1.0})
    assert not (tmp_path / "run").exists()


def test_what_is_not_finite_is_still_json(tmp_path):
    with Metrics(tmp_path) as metrics:
        metrics.log(1, {"loss": float("nan"), "grad_norm": float("inf"), "lr": 1e-5})
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=pytest.fail) == {"step": 1, "loss": None, "grad_norm": None, "lr": 1e-5}


@settings(max_examples=25, deadline=None)
@given(steps=st.integers(0, 12), resume_from=st.integers(0, 15), torn=st.integers(0, 20))
def test_any_torn_end_is_cut(tmp_path_factory, steps, resume_from, torn):
    folder = tmp_path_factory.mktemp("run")
    lines = [json.dumps({"step": step, "loss": step / 3}) + "\n" for step in range(1, steps + 1)]
    text = "".join(lines)
    (folder / "metrics.jsonl").write_text(text[: max(len(text) - torn, 0)])
    whole = text[: max(len(text) - torn, 0)].count("\n")
    with Metrics(folder, resume_from=resume_from):
        pass
    assert (folder / "metrics.jsonl").read_text() == "".join(lines[: min(whole, resume_from)])


def test_a_kill_leaves_whole_lines(tmp_path):
    process = multiprocessing.get_context("fork").Process(target=log_for_ever, args=(tmp_path,))
    process.start()
    path = tmp_path / "metrics.jsonl"
    while not path.exists() or path.read_bytes().count(b"\n") < 50:
        assert process.is_alive()
        time.sleep(0.01)
    process.kill()
    process.join()
    steps = [line["step"] for line in read_metrics(tmp_path)]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) >= 50
    with Metrics(tmp_path, resume_from=20) as metrics:
        metrics.log(21, {"loss": 0.0})
    assert [line["step"] for line in read_metrics(tmp_path)] == list(range(1, 22))


def test_wandb_must_be_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"^wandb must be None where it is not installed"):
        Metrics(tmp_path, wandb={"project": "llava-cot"})
    assert not (tmp_path / "metrics.jsonl").exists()


def test_wandb_goes_on_with_its_run(tmp_path, monkeypatch):
    monkeypatch.setitem(os.environ, "WANDB_SILENT", "true")
    ids = []
    for start in (0, 2):
        wandb = {"project": "llava-cot", "mode": "offline"}
        with Metrics(tmp_path, resume_from=start, wandb=wandb, config={"lr": 1e-5}) as metrics:
            metrics.log(start + 1, {"loss": 1.0})
            metrics.log(start + 2, {"loss": 0.5})
            ids.append(metrics._wandb.id)
    assert ids[0] == ids[1] and list((tmp_path / "wandb").glob(f"offline-run-*-{ids[0]}/*.wandb"))


VALUES = {"loss": 0.51234, "lr": 1e-5, "grad_norm": 1.5, "tokens_per_s": 12345.6, "padding": 0.125, "tokens": 7.0}


def shown(terminal):
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=120, color_system=None)
    with Progress(20, start=4, every=5, console=console) as progress:
        for step in range(5, 21):
            progress.update(step, VALUES | {"loss/CAPTION": 0.25, "eval/loss": step / 10})
    return out.getvalue()


def test_plain_lines_where_there_is_no_terminal():
    lines = shown(terminal=False).splitlines()
    assert [line.split()[1] for line in lines] == ["5/20", "10/20", "15/20", "20/20"]
    expected = (
        "loss 0.5123 lr 1.00e-05 grad norm 1.50 12,346 tokens/s padding 12.5% loss/CAPTION 0.2500 eval/loss 1.0000"
    )
    assert re.fullmatch(rf"step 10/20 {re.escape(expected)} left \d+:\d\d:\d\d", lines[1])


def test_a_bar_on_a_terminal():
    text = shown(terminal=True)
    assert "20/20" in text and "loss 0.5123  lr 1.00e-05" in text and "loss/CAPTION 0.2500  eval/loss 2.0000" in text


def test_other_ranks_show_nothing():
    out = io.StringIO()
    for terminal in (True, False):
        console = Console(file=out, force_terminal=terminal)
        with Progress(1, rank=1, every=1, console=console) as progress:
            progress.update(1, VALUES)
    assert out.getvalue() == ""
