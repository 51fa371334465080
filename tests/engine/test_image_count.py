"""Questions about no image and about several, alone and beside others."""

import base64
import json

import numpy as np
import pytest
import torch
from helpers.random_llava import FAMILIES
from helpers.random_mllama import TINY_SHAPE, build_random_mllama, random_inputs
from PIL import Image

from llava_cot import cli
from llava_cot.data import shapes
from llava_cot.data.conversations import Conversation, Turn
from llava_cot.data.encode import encode
from llava_cot.image import open_image
from llava_cot.prompt import build_inputs, split_rows

SAMPLES = [shapes.sample(seed) for seed in range(809_000, 809_004)]
QUESTION = SAMPLES[0].question
IMAGES = {0: None, 1: SAMPLES[0].image, 2: [s.image for s in SAMPLES[:2]], 3: tuple(s.image for s in SAMPLES[:3])}


def model_and_inputs(family):
    """A random model, and a function that makes a prompt with an image or without one."""
    if family == "mllama":
        model = build_random_mllama(**TINY_SHAPE, seed=2)
        with_image = (
            random_inputs(model, length=20, ratio_id=6, seed=1),
            random_inputs(model, length=9, ratio_id=1, seed=4),
        )
    else:
        build, random = FAMILIES[family]
        model = build(seed=2)
        with_image = random(model, length=40, seed=1), random(model, length=33, seed=2)
    ids = torch.randint(3, 90, (1, 13), generator=torch.Generator().manual_seed(7))
    return model, [*with_image, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}]


def greedy(model, inputs, count=20):
    found = model.generate(**inputs, do_sample=False, max_new_tokens=count)[0, inputs["input_ids"].shape[1] :].tolist()
    return found[: found.index(2)] if 2 in found else found


@pytest.mark.covering(1)
@pytest.mark.parametrize("steps_per_look", [1, 4])
@pytest.mark.parametrize("family", ["mllama", *FAMILIES])
def test_prompts_without_an_image_alone_and_beside_others(bare_generator, family, steps_per_look):
    model, inputs = model_and_inputs(family)
    expected = [greedy(model, each) for each in inputs]
    generator = bare_generator(model, page_size=4, steps_per_look=steps_per_look)
    plan = generator.plan("greedy", max_new_tokens=20)
    prompts = [row for each in inputs for row in split_rows(each, model.config)]
    for order in ([2], [2, 2], [0, 2, 1], [2, 0, 2, 1, 0], [0, 1]):
        runs = [generator.start(prompts[index], plan, 0) for index in order]
        generator.wait(runs)
        found = [[token for token in generator._nodes(run)[0].path_tokens() if token != 2] for run in runs]
        assert found == [expected[index] for index in order], order
        assert generator.engine.pages_in_use == generator.engine.images_in_use == 0
    assert [run.search.usage.image_encodings for run in runs] == [1, 1]
    ids = inputs[2]["input_ids"]
    assert (
        generator.generate(**inputs[2], search="greedy", max_new_tokens=20)[0, 13:].tolist()[: len(expected[2])]
        == expected[2]
    )
    generator.generate(input_ids=ids, search="sentence_beam", max_new_tokens=20)
    usage = generator.start(prompts[2], plan, 0)
    generator.wait([usage])
    assert usage.search.usage.image_encodings == 0


def test_a_padded_batch_with_and_without_images(bare_generator):
    """As a processor makes it: the row without an image has an empty one, and a mask of zeros.

    transformers lets such a row attend to the empty image. Here it is answered as it is alone.
    """
    model, (first, _, second) = model_and_inputs("mllama")
    missing = first["input_ids"].shape[1] - second["input_ids"].shape[1]
    batch = {name: torch.cat([value, torch.zeros_like(value)]) for name, value in first.items()}
    for name in ("input_ids", "attention_mask"):
        batch[name][1, missing:] = second[name][0]
    found = bare_generator(model, page_size=4).generate(**batch, search="greedy", max_new_tokens=20)
    for row, inputs in zip(found, (first, second)):
        new = row[first["input_ids"].shape[1] :].tolist()
        assert (new[: new.index(2)] if 2 in new else new) == greedy(model, inputs)


@pytest.mark.parametrize("search", ["greedy", "token_beam", "best_of_n", "swires"])
def test_searches_about_any_number_of_images(tiny, search):
    """Alone, beside others and streamed: the same answer."""
    settings = {"max_new_tokens": 20} | ({"cutoff": -0.1} if search == "swires" else {})
    batch = tiny.answer_batch([*IMAGES.values()], [QUESTION] * len(IMAGES), search, **settings)
    for (count, images), beside in zip(IMAGES.items(), batch):
        *_, last = tiny.stream(images, QUESTION, search, **settings)
        assert last.answer.tokens == beside.tokens
        assert beside.usage.image_encodings == last.answer.usage.image_encodings == (count > 0)
    alone = tiny.answer(None, QUESTION, search, **settings)
    assert alone.tokens == batch[0].tokens
    assert tiny.engine.pages_in_use == tiny.engine.images_in_use == 0


@pytest.mark.parametrize("count", IMAGES)
def test_the_answer_is_that_of_the_model(tiny, fresh_tiny, count):
    inputs = build_inputs(tiny.processor, IMAGES[count], QUESTION, "one")
    expected = greedy_text(tiny, fresh_tiny, inputs)
    assert tiny.answer(IMAGES[count], QUESTION, "greedy", max_new_tokens=40).tokens == expected


def greedy_text(tiny, model, inputs):
    length = inputs["input_ids"].shape[1]
    return model.generate(**inputs, do_sample=False, max_new_tokens=40)[0, length:].tolist()


@pytest.mark.parametrize("count", IMAGES)
def test_a_model_is_asked_as_it_was_trained(tiny, tmp_path, count):
    images = [] if IMAGES[count] is None else IMAGES[count] if count > 1 else [IMAGES[count]]
    paths = tuple(f"{number}.png" for number in range(len(images)))
    example = encode(Conversation("1", paths, (Turn(QUESTION, "4"),)), tiny.processor, image_folder=tmp_path)
    asked = build_inputs(tiny.processor, IMAGES[count], QUESTION, "one")["input_ids"][0].tolist()
    assert example.input_ids[: len(asked)] == asked


def test_what_a_scorer_sees(tiny):
    seen = []

    def look(spans):
        seen[:] = [np.asarray(image) for image in spans[0].images]
        return [0.0 if spans[0].image is None else 1.0] * len(spans)

    for count, images in IMAGES.items():
        given = [] if images is None else images if count > 1 else [images]
        if count < 2:
            answer = tiny.answer(images, QUESTION, "best_of_n", n=2, scorer=look, max_new_tokens=8)
            assert all(node["score"] == count for node in answer.trace.nodes.values())
        else:
            with pytest.raises(ValueError, match=f"image must be one for this scorer, got {count}"):
                tiny.answer(images, QUESTION, "best_of_n", n=2, scorer=look, max_new_tokens=8)
        assert len(seen) == count and all(map(np.array_equal, seen, map(open_image, given)))


def test_a_wrong_image_among_several_is_named(tiny, tmp_path):
    (tmp_path / "bad.png").write_text("no image")
    with pytest.raises(ValueError, match=r"image must be a readable image, got '.*bad\.png'"):
        tiny.answer([SAMPLES[0].image, tmp_path / "bad.png"], QUESTION, "greedy", max_new_tokens=4)
    with pytest.raises(TypeError, match="image must be a path"):
        tiny.answer([SAMPLES[0].image, 3], QUESTION, "greedy", max_new_tokens=4)
    with pytest.raises(TypeError, match="image must be a path"):
        tiny.answer([[SAMPLES[0].image]], QUESTION, "greedy", max_new_tokens=4)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_the_command(monkeypatch, capsys, tmp_path, count):
    names = [str(tmp_path / f"{number}.png") for number in range(count)]
    for name, sample in zip(names, SAMPLES):
        sample.image.save(name)
    trace = tmp_path / "trace.html"
    options = ["--search", "greedy", "--max-new-tokens", "12", "--json", "--trace", str(trace)]
    monkeypatch.setattr("sys.argv", ["llava-cot", "answer", *names, QUESTION, *options])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0 and json.loads(capsys.readouterr().out)["usage"]["image_encodings"] == (count > 0)
    assert trace.read_text().count("data:image/") == count
    if count:
        monkeypatch.setattr("sys.argv", ["llava-cot", "answer", names[0]])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 2 and "question must be given after the images" in capsys.readouterr().err


def test_images_of_different_sizes_in_one_question(tiny):
    small, large = SAMPLES[0].image, Image.new("RGB", (200, 30), "red")
    for images in ([small, large], [large, small, large]):
        answer = tiny.answer(images, QUESTION, "greedy", max_new_tokens=8)
        assert len(answer.tokens) == 8 and answer.usage.image_encodings == 1


def test_the_command_takes_what_a_shell_may_give(monkeypatch, capsys, tmp_path):
    """A path would lose one of two slashes, which a URI needs."""
    SAMPLES[0].image.save(tmp_path / "a b.png")
    found = []
    data = base64.b64encode((tmp_path / "a b.png").read_bytes()).decode()
    for image in (f"file://{tmp_path}/a%20b.png", f"data:image/png;base64,{data}", str(tmp_path / "a b.png")):
        options = ["--search", "greedy", "--max-new-tokens", "12", "--json"]
        monkeypatch.setattr("sys.argv", ["llava-cot", "answer", image, QUESTION, *options])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 0
        found.append(json.loads(capsys.readouterr().out)["stages"])
    assert found[0] == found[1] == found[2]
    monkeypatch.setattr(
        "sys.argv", ["llava-cot", "answer", "How many? " * 100, *options]
    )  # longer than any file's name
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
