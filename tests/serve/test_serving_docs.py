"""What docs/serving.md prints is what the server has and does."""

import re
from dataclasses import asdict
from pathlib import Path

from llava_cot.data import shapes
from llava_cot.serve.command import read_limits
from llava_cot.serve.limits import Limits

TEXT = (Path(__file__).parent.parent.parent / "docs" / "serving.md").read_text()


def test_all_limits_stand_there_with_their_defaults():
    printed = re.findall(r"`(\w+=[\d_.]+)`", TEXT.partition("| limits |")[2].partition("\n\n")[0])
    assert [item.partition("=")[0] for item in printed] == [*asdict(Limits())]
    assert read_limits(printed) == Limits()


def test_the_example_of_the_openai_client_runs(server, tmp_path, monkeypatch, capsys):
    shapes.sample(800_012).image.save(tmp_path / "shapes.png")
    monkeypatch.chdir(tmp_path)
    code = re.search(r"^```python\n(import base64.*?)^```$", TEXT, re.M | re.S)[1]
    exec(compile(code.replace("http://127.0.0.1:8000", server.url), "docs/serving.md", "exec"), {})
    assert "'name': 'swires'" in capsys.readouterr().out
