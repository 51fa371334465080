"""The shapes world as files: LLaVA-CoT-100k's layout, the pixels of the world, nothing of the test range."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image

from llava_cot.data import shapes
from llava_cot.data.conversations import parse_conversation
from llava_cot.data.world import main, write_world
from llava_cot.stages import parse


def rows_of(folder):
    return [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]


def files_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_rows_and_images(tmp_path):
    assert write_world(tmp_path, range(995, 1005)) == 10
    rows = rows_of(tmp_path)
    assert [row["id"] for row in rows] == [f"shapes-{seed}" for seed in range(995, 1005)]
    assert rows[0]["image"] == "images/0/995.png" and rows[-1]["image"] == "images/1/1004.png"
    for seed, row in zip(range(995, 1005), rows):
        sample, conversation = shapes.sample(seed), parse_conversation(row)
        assert conversation.turns[0].question == sample.question
        assert {name: stage.text for name, stage in parse(conversation.turns[0].answer).items()} == sample.stages
        with Image.open(tmp_path / conversation.images[0]) as image:
            assert image.mode == "RGB" and image.tobytes() == sample.image.tobytes()


def test_the_same_files_by_any_number_of_processes_and_by_the_command(tmp_path):
    write_world(tmp_path / "one", range(30, 60))
    write_world(tmp_path / "two", range(30, 60), processes=2)
    command = [sys.executable, "-m", "llava_cot.data.world", str(tmp_path / "three"), "--seeds", "30:60"]
    assert subprocess.run(command, capture_output=True, text=True).stdout.startswith("30 rows in")
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two") == files_of(tmp_path / "three")


def test_a_variant(tmp_path):
    assert write_world(tmp_path, range(3), "direct with caption") == 6
    rows = rows_of(tmp_path)
    assert [row["id"] for row in rows[:2]] == ["shapes-0", "shapes-0-caption"]
    assert rows[0]["conversations"][1]["value"] == shapes.sample(0).answer
    assert len(list((tmp_path / "images").rglob("*.png"))) == 3


def test_a_kill_leaves_no_jsonl_and_the_next_run_mends_it(tmp_path):
    command = [sys.executable, "-m", "llava_cot.data.world", str(tmp_path / "w"), "--seeds", "0:200000"]
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (tmp_path / "w/images/0/40.png").exists() and running.poll() is None:
        time.sleep(0.05)
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    assert (tmp_path / "w/images/0/40.png").exists() and not (tmp_path / "w/train.jsonl").exists()
    write_world(tmp_path / "w", range(40))
    assert len(rows_of(tmp_path / "w")) == 40


@pytest.mark.parametrize(
    "given, message",
    [
        (
            {"seeds": range(799_990, 800_001)},
            r"seeds must end at 800000, where the test seeds begin, got 799990:800001",
        ),
        ({"seeds": range(900_000, 900_001)}, r"seeds must end at 800000.*got 900000:900001"),
        ({"seeds": range(5, 5)}, r"seeds must be A:B with 0 <= A < B, got 5:5"),
        ({"seeds": range(-1, 5)}, r"seeds must be A:B with 0 <= A < B, got -1:5"),
        ({"seeds": range(5), "variant": "half"}, r"variant must be one of \['full', .*\], got 'half'"),
        ({"seeds": range(5), "processes": 0}, r"processes must be >= 1, got 0"),
    ],
)
def test_refused(tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        write_world(tmp_path, **given)
    assert not list(tmp_path.iterdir())


def test_the_last_seeds_before_the_test_range(tmp_path):
    assert write_world(tmp_path, range(799_998, 800_000)) == 2


def test_the_command_says_what_is_wrong(tmp_path, monkeypatch, capsys):
    for seeds, message in (("0:900000", "seeds must end at 800000"), ("7", "must be A:B, got '7'")):
        monkeypatch.setattr("sys.argv", ["world", str(tmp_path / "w"), "--seeds", seeds])
        with pytest.raises(SystemExit):
            main()
        assert message in capsys.readouterr().err
    assert not (tmp_path / "w").exists()
