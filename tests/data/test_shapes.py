"""The shapes world: the same everywhere, and true: image, caption, reasoning and answer agree."""

import hashlib
import inspect
import re
import subprocess
import sys

import numpy as np
import pytest

from llava_cot.data import shapes
from llava_cot.stages import parse, render
from tools.small_world.processor import build_processor, prompt

PINNED = "0223b8664be6fd632f0cbcb8900ed6b44149bd33dc0511eeed32540853eac82e"
SEEDS = [0, 1, 2, 812_345, 900_001]
SAMPLES = [shapes.sample(seed) for seed in [*SEEDS, *range(820_000, 820_300)]]


def fingerprint() -> str:
    digest = hashlib.sha256()
    for sample in map(shapes.sample, SEEDS):
        digest.update(sample.image.tobytes())
        digest.update("\0".join([sample.question, sample.answer, *sample.stages, *sample.stages.values()]).encode())
    return digest.hexdigest()


def test_the_same_on_every_machine():
    assert fingerprint() == PINNED


def test_the_same_in_another_process():
    source = inspect.getsource(fingerprint)  # importing this module would import transformers
    code = f"import hashlib\nfrom llava_cot.data import shapes\nSEEDS = {SEEDS}\n{source}\nprint(fingerprint())"
    done = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": ":".join(sys.path)}, capture_output=True)
    assert done.stdout.decode().strip() == PINNED, done.stderr.decode()


def test_negative_seed():
    with pytest.raises(ValueError, match=r"seed must be >= 0, got -1"):
        shapes.sample(-1)


def test_the_clean_view_is_the_same_image_without_its_noise():
    for seed in [*SEEDS, *range(820_000, 820_050)]:
        clean = np.asarray(shapes.clean_view(seed), dtype=int)
        background = clean[0, 0]
        assert len(np.unique(clean.reshape(-1, 3), axis=0)) <= 8  # the background and at most seven objects
        noise = np.asarray(shapes.sample(seed).image, dtype=int) - clean
        plain = noise[(clean == background).all(axis=-1)]  # far from black and white, so that nothing was clipped there
        assert abs(plain.mean()) < 3 and 25 < plain.std() < 30
    assert colors_seen(shapes.clean_view(5)) == colors_seen(shapes.sample(5).image)


def test_the_clean_view_of_a_negative_seed():
    with pytest.raises(ValueError, match=r"seed must be >= 0, got -2"):
        shapes.clean_view(-2)


def test_texts_parse_and_fit():
    processor = build_processor()
    for sample in SAMPLES:
        text = render(sample.stages)
        assert {name: stage.text for name, stage in parse(text).items()} == sample.stages
        tokens = processor.tokenizer(prompt(processor, sample.question) + text, add_special_tokens=False).input_ids
        assert len(tokens) + 1 <= 140  # and EOS


def test_the_judge():
    for sample in SAMPLES:
        assert sample.stages["CONCLUSION"] == sample.answer
        assert shapes.is_correct(sample, f" {sample.answer}\n")
        assert not shapes.is_correct(sample, "") and not shapes.is_correct(sample, sample.answer + "0")


def test_every_kind_of_question_is_asked():
    first_words = {sample.question.split()[0] for sample in SAMPLES}
    assert first_words == {"How", "Count", "What", "Subtract", "Remove", "Are", "Do"}
    assert {len(caption_objects(sample)) for sample in SAMPLES} == {3, 4, 5, 6, 7}


def test_the_caption_is_what_the_image_shows():
    for sample in SAMPLES:
        assert colors_seen(sample.image) == {cell: color for cell, (color, _) in caption_objects(sample).items()}


def test_the_reasoning_is_right_given_the_caption():
    for sample in SAMPLES:
        assert unread_after_checking(sample.stages["REASONING"], caption_objects(sample)) == ""


def test_the_answer_follows_from_the_question_and_the_caption():
    for sample in SAMPLES:
        assert answer_from(sample.question, caption_objects(sample)) == sample.answer


def caption_objects(sample) -> dict[str, tuple[str, str]]:
    """Cell to (color, shape), read from the CAPTION."""
    listed = re.fullmatch(r"(?:In the image,|The picture shows:|I see) (.+)\.", sample.stages["CAPTION"])[1]
    items = [item.split(": ") for item in listed.split("; ")]
    assert all(cell in shapes.CELLS for cell, _ in items)
    return {cell: tuple(thing.split()) for cell, thing in items}


def colors_seen(image) -> dict[str, str]:
    """Cell to color, read from the middle of each cell of the image."""
    pixels = np.asarray(image, dtype=float)
    known = {**shapes.COLORS, "background": (128, 128, 128)}
    seen = {}
    for index, cell in enumerate(shapes.CELLS):
        top, left = 16 * (index // 3), 16 * (index % 3)
        mean = pixels[top + 6 : top + 11, left + 6 : left + 10].mean(axis=(0, 1))
        seen[cell] = min(known, key=lambda name: np.abs(mean - known[name]).sum())
    return {cell: color for cell, color in seen.items() if color != "background"}


def count(kind: str, objects) -> int:
    """How many objects are of a kind such as "red objects", "circles" or "red circles"."""
    *color, noun = kind.split()
    shape = noun.removesuffix("s")
    return sum(color in ([], [c]) and shape in ("object", s) for c, s in objects.values())


def unread_after_checking(reasoning: str, objects) -> str:
    """Every claim of the text must be true; returns what is left without them."""

    def total(claimed):
        assert int(claimed) == len(objects)

    def counted(*pairs):
        for kind, number in pairs:
            assert int(number) == count(kind, objects)

    def subtracted(start, *rest):
        *taken, left = map(int, rest)
        assert int(start) == len(objects) and int(start) - sum(taken) == left

    def compared(n, negated, m):
        assert (int(n) > int(m)) == (not negated)

    kind = r"((?:\w+ )?\w+)"
    claims = [
        (r"There are (\d+) objects\.", total),
        (r"I see (\d+) objects in all\.", total),
        (rf"The number of {kind} is (\d+)\.", lambda x, n: counted((x, n))),
        (rf"The number of {kind} is (\d+) and of {kind} is (\d+)\.", lambda x, n, y, m: counted((x, n), (y, m))),
        (rf"I count (\d+) {kind}\.", lambda n, x: counted((x, n))),
        (rf"I count (\d+) {kind} and (\d+) {kind}\.", lambda n, x, m, y: counted((x, n), (y, m))),
        (r"(\d+) - (\d+) - (\d+) = (\d+)\.", subtracted),
        (r"(\d+) - (\d+) = (\d+)\.", subtracted),
        (r"(\d+) is (not )?more than (\d+)\.", compared),
    ]
    for pattern, check in claims:
        for found in re.finditer(pattern, reasoning):
            check(*found.groups())
        reasoning = re.sub(pattern, "", reasoning)
    return reasoning.strip()


def answer_from(question: str, objects) -> str:
    """The answer, worked out again from the question's words."""
    kind = r"((?:\w+ )?\w+)"
    if found := re.match(rf"Are there more {kind} than {kind}\?|Do the {kind} outnumber the {kind}\?", question):
        x, y = (count(k, objects) for k in found.groups() if k)
        return "yes" if x > y else "no"
    removed = rf"(?:Subtract|Remove) all {kind}(?: and all {kind})?\. How many|How many objects are not {kind}\?"
    if found := re.match(removed, question):
        return str(len(objects) - sum(count(k, objects) for k in found.groups() if k))
    found = re.match(rf"How many {kind} are there\?|Count the {kind}\.|What is the number of {kind}\?", question)
    return str(sum(count(k, objects) for k in found.groups() if k))
