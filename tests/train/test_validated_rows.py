"""What ``validate`` calls clean, ``train`` reads: the same rows, whatever stands in the other rows."""

import json

import datasets
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoProcessor

from llava_cot import tiny_path
from llava_cot.data.checks import LineChecks
from llava_cot.data.collate import Collator
from llava_cot.data.example import Example
from llava_cot.data.images import ImageChecks
from llava_cot.data.validate import validate_file
from llava_cot.stages import STAGES, render
from llava_cot.train.config import TrainConfig
from llava_cot.train.distributed import process_group
from llava_cot.train.examples import load_examples
from llava_cot.train.model import build_model
from llava_cot.train.objectives.sft import Sft

ANSWER = render({stage: f"some {stage.lower()}" for stage in STAGES})
IMAGES = {
    "rgb.png": ("RGB", (40, 30)),
    "one.png": ("L", (1, 1)),
    "wide.png": ("RGBA", (100, 2)),
    "i16.png": ("I;16", (9, 7)),
}


def row(id="1", image="rgb.png", question="How many?", answer=ANSWER, **extra):
    talk = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    made = {"id": id, "image": image, "conversations": talk} | extra
    return {name: value for name, value in made.items() if value is not None}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A function that validates a file, trains on what is clean, and returns the report and the examples."""
    folder = tmp_path_factory.mktemp("data")
    for name, (mode, size) in IMAGES.items():
        Image.new(mode, size, 90).save(folder / name)
    check = LineChecks(ImageChecks(folder), allow_text_only=True)
    processor, objective = AutoProcessor.from_pretrained(tiny_path()), Sft({})
    names = {"model": str(tiny_path()), "output": folder / "out", "device": "cpu", "precision": {"compute": "float32"}}
    config = TrainConfig(data=folder / "clean.jsonl", images=folder, attention="eager", **names)
    model = build_model(config, empty=False)
    collate = Collator(processor, model.config)

    def train(content):
        (folder / "data").write_bytes(content)
        report = validate_file(folder / "data", config.data, folder / "bad.jsonl", check)
        if not report.total.clean:
            return report, []
        rows = load_examples(config, objective, processor)
        examples = [[Example(**example) for example in row["examples"]] for row in rows]
        for start in range(0, len(examples), 4):
            model.zero_grad()
            losses = objective(model, collate(examples[start : start + 4]))
            losses.total.backward()
            assert losses.total.isfinite() and all(
                p.grad.isfinite().all() for p in model.parameters() if p.grad is not None
            )
        return report, [example for row in examples for example in row]

    before, threads = datasets.config.HF_DATASETS_CACHE, torch.get_num_threads()
    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    torch.set_num_threads(1)
    with process_group("cpu"):
        yield train
    datasets.config.HF_DATASETS_CACHE = before
    torch.set_num_threads(threads)


def lines(*rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


CLEAN = {
    "columns that come late": [
        row(),
        row("2", provenance={"model": "m", "usage": {"requests": 2}}),
        row("3", extra=[1]),
    ],
    "columns of other types": [row(extra=1), row("2", extra="text"), row("3", extra={"a": None}), row("4", extra=[])],
    "ids that are numbers": [row(1), row("a"), row(10**30), row(-3)],
    "ids that look like dates": [row("2024-01-02"), row("2024-01-03"), row("12:30"), row("2024-01-02T00:00:00Z")],
    "rows without an image first": [row(image=None), row("2", None), row("3")],
    "lists of images later": [row(), row("2", ["one.png", "rgb.png"]), row("3", ["wide.png"]), row("4", [])],
    "images of all modes": [row(number, name) for number, name in enumerate(IMAGES)],
    "special tokens": [
        row(question="What is <|eot_id|> or <|image|>?"),
        row("2", answer=ANSWER.replace("some", "</s> <s>")),
    ],
    "line separators": [row(question="a\u2028b\u2029c\x85d\x0be"), row("2", question="\ufeff?")],
}


@pytest.mark.parametrize("kind", CLEAN)
def test_every_clean_row_is_trained_on(trained, kind):
    report, examples = trained(lines(*CLEAN[kind]))
    assert report.total.clean == len(examples) == len(CLEAN[kind])


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_byte_order_mark_and_an_array(trained, mark):
    rows = CLEAN["ids that are numbers"]
    for content in (lines(*rows), json.dumps(rows, indent=1).encode(), json.dumps(rows).encode()):
        report, examples = trained(mark + content)
        assert report.total.clean == len(examples) == len(rows)


def test_long_rows_change_nothing(trained):
    """Types were once guessed from the first ten megabytes."""
    rows = [row(number, padding="x" * 1_500_000) for number in range(8)]
    report, examples = trained(lines(*rows, row("text", padding=["other"]), row("late", late=1)))
    assert report.total.clean == len(examples) == 10


def test_no_rows_are_an_error(trained, tmp_path):
    for content in (b"", b"\n \n", b"[]"):
        (tmp_path / "data").write_bytes(content)
        config = TrainConfig(model=str(tiny_path()), output=tmp_path / "out", data=tmp_path / "data")
        with pytest.raises(ValueError, match=r"data must have a row, got none in '.*data'"):
            load_examples(config, Sft({}), AutoProcessor.from_pretrained(tiny_path()))


WORDS = st.text(max_size=30) | st.sampled_from(
    ["<|eot_id|>", "<s>", "</SUMMARY>", "<image>", "\u200b", "\ufdd0", " \n\t"]
)
ANSWERS = st.lists(WORDS, min_size=4, max_size=4).map(lambda texts: render(dict(zip(STAGES, texts)))) | WORDS
IDS = st.text(min_size=1, max_size=20) | st.integers() | st.none() | st.floats() | st.dates().map(str)
FILES = st.none() | st.sampled_from([*IMAGES, "none.png", "../data"]) | st.lists(st.sampled_from([*IMAGES]), max_size=2)
JSON = st.none() | st.integers() | st.text(max_size=5) | st.lists(st.integers(), max_size=2) | st.dates().map(str)
MANY = st.builds(row, IDS, FILES, WORDS, ANSWERS, extra=JSON) | st.builds(row, IDS, FILES, extra=JSON)


@settings(suppress_health_check=list(HealthCheck))
@given(
    st.lists(MANY | JSON.filter(lambda row: not isinstance(row, list)), max_size=8),
    st.sampled_from(["lines", "array"]),
    st.booleans(),
)
def test_whatever_is_clean_is_trained_on(trained, rows, form, ascii):
    content = [json.dumps(row, ensure_ascii=ascii) for row in rows]
    text = "\n".join(content) if form == "lines" else "[" + ",\n".join(content) + "]"
    report, examples = trained(text.encode("utf-8", "surrogatepass"))
    assert len(examples) == report.total.clean
    assert report.total.clean + report.total.quarantined == len(rows)
