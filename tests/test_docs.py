"""The examples of docs/search.md run as they stand there, one after another."""

import re
from pathlib import Path

import pytest

from llava_cot.data import shapes
from llava_cot.prompt import build_inputs
from llava_cot.scoring import SCORERS, confidence
from llava_cot.search import POLICIES

TEXT = (Path(__file__).parent.parent / "docs" / "search.md").read_text()
SAMPLE = shapes.sample(802_000)


def blocks(heading):
    section = re.search(rf"^## {re.escape(heading)}$(.*?)(?=^## |\Z)", TEXT, re.M | re.S)[1]
    return re.findall(r"^```python\n(.*?)^```$", section, re.M | re.S)


@pytest.mark.parametrize(
    "heading", ["Budgets", "Grammars", "Your own policy", "Your own scorer", "In place of `model.generate`"]
)
def test_the_examples_run(tiny, heading):
    inputs = build_inputs(tiny.processor, SAMPLE.image, SAMPLE.question, "one")
    names = {"generator": tiny, "image": SAMPLE.image, "question": SAMPLE.question, "inputs": inputs}
    names["confidence"] = confidence
    found = blocks(heading)
    assert found
    for code in found:
        exec(compile(code, f"docs/search.md, {heading}", "exec"), names)
        if "answer" in names:
            answer = names.pop("answer")
            assert answer.conclusion and answer.violation is None, code
    assert tiny.engine.pages_in_use == 0


def test_every_policy_and_scorer_is_in_its_table():
    for name in (*POLICIES, *SCORERS):
        assert f'| `"{name}"` |' in TEXT
