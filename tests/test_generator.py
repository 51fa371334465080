"""The generator on the real engine: every outcome it documents, and what it must leave untouched."""

import copy
import json
import pickle
import warnings
import weakref

import numpy as np
import pytest
import torch

import llava_cot.image as image_module
from llava_cot import (
    STAGES,
    BestOfNConfig,
    Budget,
    Finished,
    MajorityConfig,
    StageBeamConfig,
    SwiresConfig,
    SwiresGenerator,
)
from llava_cot.core import SamplingParams
from llava_cot.data import shapes
from llava_cot.families import family_of
from llava_cot.image import open_image
from llava_cot.scoring import confidence
from llava_cot.search.events import StageFinal, TextDelta
from llava_cot.search.tree import Node, candidate_seed
from llava_cot.stages import Outcome
from llava_cot.trace.schema import TRACE_VERSION
from llava_cot_kernels import OutOfPages
from tools.small_world.processor import prompt
from tools.small_world.untrained import build_model

SAMPLES = [shapes.sample(seed) for seed in range(803_000, 803_005)]
SAMPLE = SAMPLES[0]
LIMITS = dict(zip(STAGES, (20, 30, 30, 8)))  # tokens; an untrained model closes no stage
SEARCH = SwiresConfig.published(cutoff=-0.05, max_rounds=2, max_stage_tokens=LIMITS)


def ask(generator, sample=SAMPLE, search=SEARCH, **settings):
    return generator.answer(sample.image, sample.question, search, **settings)


def batch(generator, samples):
    """The processor's inputs, padded on the left."""
    return generator.processor(
        images=[[sample.image] for sample in samples],
        text=[prompt(generator.processor, sample.question) for sample in samples],
        add_special_tokens=False,
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )


def essence(answer):
    """What two equal searches have in common: everything but the time they took and the last bits of their scores."""
    nodes = [
        (n["parent"], n["stage"], n["round"], n["index"], n["seed"], n["tokens"], n["finish"], n["closed"], n["kept"])
        for n in answer.trace.data["nodes"]
    ]
    retraces = [(event["stage"], event["to"], event["round"]) for event in answer.trace.events("retraced")]
    return answer.tokens, answer.text, answer.stages, retraces, answer.trace.data["answer"], nodes


def assert_nothing_held(generator):
    assert (generator.engine.pages_in_use, generator.engine.images_in_use) == (0, 0)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    SAMPLE.image.save(folder / "good.png")
    data = (folder / "good.png").read_bytes()
    (folder / "truncated.png").write_bytes(data[: len(data) // 2])
    (folder / "text.png").write_text("no image at all")
    SAMPLE.image.save(folder / "bomb.bmp")
    data = bytearray((folder / "bomb.bmp").read_bytes())
    data[18:26] = (60_000).to_bytes(4, "little") * 2  # its width and height
    (folder / "bomb.bmp").write_bytes(data)
    return folder


# What is wrong: (the call, the error, its message)
BAD_ANSWERS = {
    "an image that is none": (
        lambda g, f: g.answer([None], "?"),
        TypeError,
        "image must be a path, .* or a mapping with 'bytes' or 'path', got None",
    ),
    "a number": (lambda g, f: g.answer(3, "?"), TypeError, "image must be a path, .*, got int"),
    "not an image": (
        lambda g, f: g.answer(f / "text.png", "?"),
        ValueError,
        "image must be a readable image, got '.*text.png': its format is not known",
    ),
    "half an image": (
        lambda g, f: g.answer(f / "truncated.png", "?"),
        ValueError,
        "image must be .*truncated.png': [^\n]*truncated",
    ),
    "a bomb": (lambda g, f: g.answer(f / "bomb.bmp", "?"), ValueError, "image must be .*bomb.bmp.* exceeds limit"),
    "strings": (
        lambda g, f: g.answer(np.full((48, 48, 3), "a"), "?"),
        ValueError,
        "an array of <U1: its values must be booleans, integers or floats",
    ),
    "channels first": (
        lambda g, f: g.answer(np.zeros((3, 48, 48), np.uint8), "?"),
        ValueError,
        r"an array of uint8: its shape must be \[H, W\] or \[H, W, 1 to 4\], but is \[3, 48, 48\]",
    ),
    "a folder": (lambda g, f: g.answer(f, "?"), ValueError, "image must be a readable image"),
    "no file": (lambda g, f: g.answer(f / "none.png", "?"), ValueError, "image must be .*none.png.*No such file"),
    "no question": (lambda g, f: ask_this(g, ""), ValueError, "question must be a non-empty string, got ''"),
    "a blank question": (
        lambda g, f: ask_this(g, " \n"),
        ValueError,
        r"question must be a non-empty string, got ' \\n'",
    ),
    "a noncharacter": (
        lambda g, f: ask_this(g, "a \ufdd0?"),
        ValueError,
        r"question must be Unicode text, got the noncharacter '\\ufdd0' at 2",
    ),
    "no string": (lambda g, f: ask_this(g, 3), ValueError, "question must be a non-empty string, got 3"),
    "unknown search": (
        lambda g, f: ask(g, search="beam"),
        ValueError,
        r"search must be one of \[.*'swires'.*\], .* got 'beam'",
    ),
    "a class": (lambda g, f: ask(g, search=SwiresConfig), ValueError, "search must be one of"),
    "unknown setting": (
        lambda g, f: ask(g, search="greedy", candidates=3),
        ValueError,
        r"candidates is not supported by search='greedy'; its settings are \['max_new_tokens', 'budget'\]",
    ),
    "settings of a function": (
        lambda g, f: ask(g, search=lambda search: None, top_p=0.5),
        ValueError,
        "a policy function must bring its own settings, got 'top_p'",
    ),
    "seed below": (lambda g, f: ask(g, seed=-1), ValueError, r"seed must be in \[0, 2\*\*63\), got -1"),
    "a seed as text": (lambda g, f: ask(g, seed="3"), TypeError, "seed must be an integer, got '3'"),
    "no seed": (lambda g, f: ask(g, seed=None), TypeError, "seed must be an integer, got None"),
    "a setting as text": (lambda g, f: ask(g, max_new_tokens="8"), TypeError, "max_new_tokens must be int, got '8'"),
    "a setting of None": (lambda g, f: ask(g, temperature=None), TypeError, "temperature must be float, got None"),
    "a truth value": (lambda g, f: ask(g, max_rounds=True), TypeError, "max_rounds must be int, got True"),
    "half a candidate": (lambda g, f: ask(g, search="best_of_n", n=2.5), TypeError, r"n must be int, got 2\.5"),
    "seed above": (
        lambda g, f: ask(g, seed=2**63),
        ValueError,
        r"seed must be in \[0, 2\*\*63\), got 9223372036854775808",
    ),
    "unlike lengths": (
        lambda g, f: g.answer_batch([SAMPLE.image] * 2, ["?"]),
        ValueError,
        "questions must have one entry per image=2, got 1",
    ),
    "no tokens": (lambda g, f: ask(g, max_new_tokens=0), ValueError, "max_new_tokens must be >= 1, got 0"),
    "temperature": (lambda g, f: ask(g, temperature=-1.0), ValueError, "temperature must be >= 0, got -1.0"),
    "top_p": (lambda g, f: ask(g, top_p=0.0), ValueError, r"top_p must be in \(0, 1\], got 0.0"),
    "unknown scorer": (lambda g, f: ask(g, scorer="taste"), ValueError, r"scorer must be one of .* got 'taste'"),
    "one bad of two": (
        lambda g, f: g.answer_batch([SAMPLE.image, f / "text.png"], ["?", "?"]),
        ValueError,
        "image must be a readable image",
    ),
}
BAD_GENERATES = {
    "nothing": (lambda g, i: g.generate(), "input_ids must be given"),
    "no pixels": (lambda g, i: g.generate(**without(i, "pixel_values")), "pixel_values must be given"),
    "beams": (lambda g, i: g.generate(**i, num_beams=4), "num_beams is not supported by search='swires'"),
    "sampling greedily": (
        lambda g, i: g.generate(**i, search="greedy", do_sample=True),
        "do_sample must be False with search='greedy', got True",
    ),
    "searching without sampling": (
        lambda g, i: g.generate(**i, search="swires", do_sample=False),
        "do_sample must be True with search='swires', got False",
    ),
    "no image token": (
        lambda g, i: g.generate(**{**i, "cross_attention_mask": torch.zeros_like(i["cross_attention_mask"])}),
        r"input_ids\[0\] must contain the image token",
    ),
    "flat ids": (
        lambda g, i: g.generate(**{**i, "input_ids": i["input_ids"][0]}),
        r"input_ids must have shape \[batch",
    ),
    "unlike batches": (
        lambda g, i: g.generate(**{**i, "pixel_values": i["pixel_values"].repeat(2, 1, 1, 1, 1, 1)}),
        "pixel_values must have batch=1 in dimension 0, got 2",
    ),
    "max_length": (
        lambda g, i: g.generate(**i, max_length=1),
        r"max_length must be > \d+, the tokens of the prompt, got 1",
    ),
    "max_length as text": (lambda g, i: g.generate(**i, max_length="30"), "max_length must be int, got '30'"),
    "a pad token as text": (
        lambda g, i: g.generate(**i, pad_token_id="<pad>"),
        "pad_token_id must be int or None, got '<pad>'",
    ),
    "ids in a list": (
        lambda g, i: g.generate(**{**i, "input_ids": i["input_ids"].tolist()}),
        r"input_ids must be a tensor, got \[\[",
    ),
    "a mask in a list": (
        lambda g, i: g.generate(**{**i, "attention_mask": i["attention_mask"].tolist()}),
        r"attention_mask must be a tensor, got \[\[",
    ),
    "ids of another kind": (
        lambda g, i: g.generate(**{**i, "input_ids": i["input_ids"].float()}),
        r"input_ids must have shape \[batch, tokens >= 1\] of int64, got .* of torch.float32",
    ),
    "ids below": (
        lambda g, i: g.generate(**{**i, "input_ids": torch.cat([i["input_ids"][:, 1:], torch.tensor([[-200]])], 1)}),
        r"input_ids must be in \[0, 648\), got .*-200",
    ),
    "ids above": (
        lambda g, i: g.generate(**{**i, "input_ids": i["input_ids"] + 600}),
        r"input_ids must be in \[0, 648\), got ",
    ),
    "a mask too short": (
        lambda g, i: g.generate(**{**i, "attention_mask": i["attention_mask"][:, 1:]}),
        "attention_mask must have tokens=.* in dimension 1, got ",
    ),
    "no aspect_ratio_ids": (
        lambda g, i: g.generate(**without(i, "aspect_ratio_ids")),
        "aspect_ratio_ids must be given: a prompt with its images, as the processor makes them, got None",
    ),
    "no aspect_ratio_mask": (
        lambda g, i: g.generate(**without(i, "aspect_ratio_mask")),
        "aspect_ratio_mask must be given",
    ),
    "no cross_attention_mask": (
        lambda g, i: g.generate(**without(i, "cross_attention_mask")),
        "cross_attention_mask must be given",
    ),
    "a cross_attention_mask too long": (
        lambda g, i: g.generate(**changed(i, "cross_attention_mask", lambda mask: mask.repeat(1, 2, 1, 1))),
        "cross_attention_mask must have tokens=.* in dimension 1, got ",
    ),
    "an empty cross_attention_mask": (
        lambda g, i: g.generate(**changed(i, "cross_attention_mask", lambda mask: mask[:, :0])),
        "cross_attention_mask must have tokens=.* in dimension 1, got 0",
    ),
    "tiles of another model": (
        lambda g, i: g.generate(**changed(i, "pixel_values", lambda pixels: pixels.repeat(1, 1, 4, 1, 1, 1))),
        "pixel_values must have tiles=1 in dimension 2, got 4",
    ),
    "a size of another model": (
        lambda g, i: g.generate(**changed(i, "pixel_values", lambda pixels: pixels[..., :40])),
        "pixel_values must have width=48 in dimension 5, got 40",
    ),
    "an aspect ratio of another model": (
        lambda g, i: g.generate(**changed(i, "aspect_ratio_ids", lambda ids: ids + 5)),
        r"aspect_ratio_ids must be in \[0, 1\], got \[6\]",
    ),
    "images that differ in number": (
        lambda g, i: g.generate(**changed(i, "aspect_ratio_mask", lambda mask: mask.repeat(1, 2, 1))),
        "aspect_ratio_mask must have images=1 in dimension 1, got 2",
    ),
}


def ask_this(generator, question):
    return generator.answer(SAMPLE.image, question)


def without(inputs, name):
    return {key: value for key, value in inputs.items() if key != name}


def changed(inputs, name, change):
    return {**inputs, name: change(inputs[name])}


@pytest.mark.parametrize("call, error, message", BAD_ANSWERS.values(), ids=BAD_ANSWERS)
def test_a_bad_question(tiny, files, call, error, message):
    with pytest.raises(error, match=message):
        call(tiny, files)
    assert_nothing_held(tiny)


@pytest.mark.parametrize("call, message", BAD_GENERATES.values(), ids=BAD_GENERATES)
def test_a_bad_call_of_generate(tiny, call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call(tiny, dict(batch(tiny, [SAMPLE])))
    assert_nothing_held(tiny)


def test_none_is_as_if_it_had_not_been_given(tiny):
    """As in transformers, for all arguments that have its names."""
    inputs = batch(tiny, [SAMPLE])
    expected = tiny.generate(**inputs, search="sample", seed=2, max_new_tokens=9)
    length = inputs["input_ids"].shape[1] + 9
    unset = dict.fromkeys(("temperature", "top_k", "top_p", "min_p", "num_return_sequences", "max_new_tokens"))
    got = tiny.generate(**inputs, search="sample", seed=2, max_length=length, pad_token_id=None, **unset)
    assert torch.equal(got, expected)
    short = {**inputs, "cross_attention_mask": inputs["cross_attention_mask"][:, :-2]}
    assert torch.equal(tiny.generate(**short, search="sample", seed=2, max_new_tokens=9), expected)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"bos": "two"}, "bos must be 'one' or 'released', got 'two'"),
        ({"page_size": 0}, "page_size must be >= 1, got 0"),
        ({"num_pages": 0}, "num_pages must be >= 1, got 0"),
    ],
)
def test_a_bad_generator(bare_generator, tiny, settings, message):
    with pytest.raises(ValueError, match=message):
        bare_generator(tiny.model, **settings)


def test_a_cache_that_not_even_the_prompt_fits(bare_generator, tiny):
    generator = bare_generator(tiny.model, num_pages=2, page_size=4)
    with pytest.raises(OutOfPages, match=r"num_pages=2 of page_size=4.* too small .*raise num_pages"):
        ask(generator)
    assert_nothing_held(generator)


def test_images_of_every_kind_are_the_same_question(tiny, files):
    kinds = [
        SAMPLE.image,
        np.asarray(SAMPLE.image),
        files / "good.png",
        str(files / "good.png"),
        SAMPLE.image.convert("RGBA"),
    ]
    tokens = [tiny.answer(image, SAMPLE.question, "greedy", max_new_tokens=20).tokens for image in kinds]
    assert all(other == tokens[0] for other in tokens)


def test_stages_that_never_close(tiny):
    answer = ask(tiny, max_stage_tokens=dict.fromkeys(STAGES, 3))
    assert len(answer.tokens) == 3 * len(STAGES)
    for stage in answer.stages.values():
        began = stage.stage.open_tag in answer.text
        assert stage.outcome is (Outcome.UNCLOSED if began else Outcome.MISSING)
    nodes = answer.trace.data["nodes"]
    assert {(node["finish"], node["closed"]) for node in nodes} == {("length", False)}
    assert {node["round"] for node in nodes} == {1, 2}  # none of them may pass
    assert_nothing_held(tiny)


def test_a_model_without_tags(bare_generator, tiny):
    untrained = bare_generator(build_model(tiny.processor, seed=0))
    for search in (SEARCH, "greedy"):
        answer = ask(untrained, search=search, max_new_tokens=60)
        assert answer.conclusion == ""
        assert {stage.outcome for stage in answer.stages.values()} == {Outcome.MISSING}
    assert_nothing_held(untrained)


@pytest.mark.parametrize("search", [SEARCH, "sample", BestOfNConfig(n=3)], ids=["swires", "sample", "best_of_n"])
def test_a_seed_is_an_answer(tiny, search):
    first, again, other = (ask(tiny, search=search, max_new_tokens=50, seed=seed) for seed in (1, 1, 2))
    assert essence(first) == essence(again)
    assert [n["tokens"] for n in first.trace.data["nodes"]] != [n["tokens"] for n in other.trace.data["nodes"]]


@pytest.mark.parametrize(
    "search",
    [
        SEARCH,
        BestOfNConfig(n=2, max_new_tokens=60),
        MajorityConfig(n=3, max_new_tokens=60),
        StageBeamConfig(max_stage_tokens=LIMITS),
    ],
    ids=["swires", "best_of_n", "majority", "stage_beam"],
)
def test_a_batch_is_its_questions(tiny, bare_generator, search):
    """Also where the pages are so few that the questions must take turns."""
    samples = SAMPLES[:2]
    images, questions = [s.image for s in samples], [s.question for s in samples]
    alone, peaks = [], []
    for sample in samples:
        tiny.engine.runner.peak_pages = 0
        alone.append(essence(ask(tiny, sample, search, seed=5)))
        peaks.append(tiny.engine.runner.peak_pages)
    roomy = tiny.answer_batch(images, questions, search, seed=5)
    crowded_generator = bare_generator(tiny.model, page_size=4, num_pages=max(peaks))
    crowded = crowded_generator.answer_batch(images, questions, search, seed=5)
    assert [essence(answer) for answer in roomy] == alone
    assert [essence(answer) for answer in crowded] == alone
    assert {answer.usage.image_encodings for answer in roomy} == {1}
    assert max(answer.usage.recomputed_tokens for answer in crowded) > 0  # some had to give up their pages
    assert_nothing_held(crowded_generator)


def test_generate_on_a_padded_batch_is_generate_on_its_rows(tiny):
    inputs = batch(tiny, SAMPLES)
    assert (inputs["attention_mask"][:, 0] == 0).any(), "the prompts must differ in length"
    settings = dict(search="sample", num_return_sequences=2, max_new_tokens=60, seed=3)
    together = tiny.generate(**inputs, **settings)
    prompt_length = inputs["input_ids"].shape[1]
    assert together.shape[0] == 2 * len(SAMPLES)
    assert torch.equal(together[:, :prompt_length], inputs["input_ids"].repeat_interleave(2, dim=0))
    pad = tiny.processor.tokenizer.pad_token_id
    for row, sample in enumerate(SAMPLES):
        one = batch(tiny, [sample])
        alone = tiny.generate(**one, **settings)[:, one["input_ids"].shape[1] :]
        pair = together[2 * row : 2 * row + 2, prompt_length:]
        assert torch.equal(pair[:, : alone.shape[1]], alone)
        assert (pair[:, alone.shape[1] :] == pad).all()
        assert not torch.equal(alone[0], alone[1])


def test_what_can_not_be_asked_stands_in_its_place(tiny, files):
    """An item that can't even be prepared takes nobody with it, in whichever place of the batch."""
    wrong = [
        (files / "truncated.png", "?", ValueError, "truncated.png"),
        (files / "none.png", "?", ValueError, "No such file"),
        (b"text", "?", ValueError, "its format is not known"),
        ([None], "?", TypeError, "image must be a"),
        (SAMPLE.image, " ", ValueError, "question must be a non-empty string"),
        (SAMPLE.image, 3, ValueError, "question must be a non-empty string"),
    ]
    good = [(sample.image, sample.question) for sample in SAMPLES[:3]]
    items = [good[0], *((image, question) for image, question, *_ in wrong[:3]), good[1], *(w[:2] for w in wrong[3:])]
    items.append(good[2])
    images, questions = zip(*items)
    found = tiny.answer_batch(images, questions, "greedy", max_new_tokens=20, return_exceptions=True)
    answers = [answer for answer in found if not isinstance(answer, Exception)]
    assert [a.tokens for a in answers] == [ask(tiny, s, "greedy", max_new_tokens=20).tokens for s in SAMPLES[:3]]
    errors = [error for error in found if isinstance(error, Exception)]
    for error, (_, _, kind, message) in zip(errors, wrong, strict=True):
        assert type(error) is kind and message in str(error)
    assert_nothing_held(tiny)


def test_no_more_images_are_open_than_searches_run(tiny, bare_generator, monkeypatch, tmp_path):
    """Forty photos, of which the pages have room for a few: the others stay on the disk until it is their turn."""
    opened, most = [], 0

    def counting(image):
        nonlocal most
        found = open_image(image)
        opened.append(weakref.ref(found))
        most = max(most, open_now())
        return found

    def open_now():
        return sum(image() is not None for image in opened)

    monkeypatch.setattr(image_module, "open_image", counting)
    SAMPLE.image.save(path := tmp_path / "photo.png")
    generator = bare_generator(tiny.model, page_size=4, num_pages=60)
    jobs, loaded = generator.engine.schedule.jobs, 0
    runs = generator.submit_all([path] * 40, ["How many?"] * 40, generator.plan("best_of_n", n=2, max_new_tokens=5))
    assert not opened
    while generator.engine.step():
        loaded = max(loaded, sum(job.inputs is not None for job in jobs))
    assert all(run.done and run.error is None for run in runs)
    assert most == 1 and 1 < loaded < 20 and open_now() == 0
    assert not any(run.search.session._job.inputs for run in runs)


def test_torch_manual_seed_makes_generate_repeatable(tiny):
    inputs, results = batch(tiny, [SAMPLE]), []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        results.append([tiny.generate(**inputs, search="sample", max_new_tokens=60).tolist() for _ in range(2)])
    assert results[0] == results[1] != results[2]
    assert results[0][0] != results[0][1]  # nor is every call the same


def test_max_length_counts_the_prompt(tiny):
    inputs = batch(tiny, [SAMPLE])
    length = inputs["input_ids"].shape[1] + 5
    assert tiny.generate(**inputs, search="greedy", max_length=length).shape == (1, length)


def test_a_policy_function(tiny):
    def best_of_two(search):
        nodes = yield from search.expand([search.root], 2, None, params=SamplingParams(temperature=0.6))
        yield from search.score(nodes, confidence)
        return min(nodes, key=Node.rank)

    answer = ask(tiny, search=best_of_two, max_new_tokens=50, seed=9)
    assert answer.trace.data["search"] == "best_of_two"
    first, second = answer.trace.data["nodes"]
    best = min((first, second), key=lambda node: (not node["closed"], -node["score"]))
    assert answer.tokens == best["tokens"] and len(best["tokens"]) <= 50


def test_answers_travel_and_generators_say_why_they_do_not(tiny):
    answer = ask(tiny, search="greedy", max_new_tokens=5)
    again = pickle.loads(pickle.dumps(answer))
    assert (again.text, again.tokens, again.stages) == (answer.text, answer.tokens, answer.stages)
    assert again.trace.to_json() == answer.trace.to_json()
    for give in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match=r"a SwiresGenerator can't be pickled, since .*make one in each process"):
            give(tiny)


@pytest.mark.parametrize(
    "settings",
    [
        {"max_new_tokens": 30},
        {"max_new_tokens": 160},
        {"max_new_tokens": 160, "budget": Budget(generated_tokens=20, reserve=0.8)},
    ],
    ids=["cut", "whole", "finished from the reserve"],
)
def test_a_greedy_stream(tiny, settings):
    expected = ask(tiny, search="greedy", **settings)
    events = [*tiny.stream(SAMPLE.image, SAMPLE.question, "greedy", **settings)]
    deltas = [event.text for event in events if isinstance(event, TextDelta)]
    assert "".join(deltas) == expected.text and len(deltas) > 5
    assert "".join(event.text for event in events if isinstance(event, StageFinal)) == expected.text
    assert isinstance(events[-1], Finished) and events[-1].answer.tokens == expected.tokens


def test_a_stream_of_stages(tiny):
    events = [*tiny.stream(SAMPLE.image, SAMPLE.question, SEARCH, seed=1)]
    finished = events[-1]
    assert isinstance(finished, Finished) and essence(finished.answer) == essence(ask(tiny, seed=1))
    assert "".join(event.text for event in events if isinstance(event, StageFinal)) == finished.answer.text
    assert not any(isinstance(event, TextDelta) for event in events)


def test_an_answer_while_a_stream_is_open(tiny):
    alone = ask(tiny, seed=1), ask(tiny, SAMPLES[1], seed=2)
    stream = tiny.stream(SAMPLE.image, SAMPLE.question, SEARCH, seed=1)
    next(stream)
    held = tiny.engine.pages_in_use
    assert held > 0
    with pytest.raises(ValueError):
        tiny.answer(SAMPLES[1].image, "?", SEARCH, temperature=-1.0)
    assert tiny.engine.pages_in_use == held
    assert essence(ask(tiny, SAMPLES[1], seed=2)) == essence(alone[1])  # the stream goes on in the same passes
    *_, finished = stream
    assert essence(finished.answer) == essence(alone[0])
    assert_nothing_held(tiny)


def test_a_trace_is_json_and_holds_the_answer(tiny):
    def unsure(spans):
        return [float("nan"), *confidence(spans[1:])]

    answer = ask(tiny, scorer=unsure, seed=6)

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    trace = json.loads(answer.trace.to_json(), parse_constant=refuse)
    assert (trace["version"], trace["search"], trace["seed"], trace["bos"]) == (TRACE_VERSION, "swires", 6, "one")
    assert trace["config"]["scorer"] == "unsure" and trace["config"]["candidates"]["CAPTION"] == 4
    assert trace["usage"]["generated_tokens"] == sum(len(node["tokens"]) for node in trace["nodes"])
    nodes = {node["id"]: node for node in trace["nodes"]}
    for node in nodes.values():
        place = (node["stage"], node["round"], node["parent"], node["index"])
        assert node["seed"] == candidate_seed(6, *place)
        assert len(node["tokens"]) == len(node["logprobs"]) == len(node["entropies"]) > 0
        assert node["finish"] in ("tag", "eos", "length") and node["seconds"] > 0
    path, at = [], trace["answer"]
    while at:
        path, at = nodes[at]["tokens"] + path, nodes[at]["parent"]
    assert path == answer.tokens
    assert answer.text == tiny.processor.tokenizer.decode(path, skip_special_tokens=True)
    worst = [node["score"] for node in trace["nodes"] if node["stage"] == "CAPTION" and node["index"] == 0]
    assert set(worst) == {"-inf"}  # JSON has no NaN and no infinity


def test_a_scorer_may_hold_anything(tiny):
    class Verifier:
        def __call__(self, spans):
            return confidence(spans)

        def __deepcopy__(self, memo):
            raise AssertionError("a scorer may hold a model: it is never copied")

    answer = ask(tiny, scorer=Verifier())
    assert answer.trace.data["config"]["scorer"] == "Verifier"


def test_a_calibration_is_of_one_scorer(bare_generator, tiny):
    def doubled(spans):
        return [2 * score for score in confidence(spans)]

    generator = bare_generator(tiny.model)
    images, questions = [s.image for s in SAMPLES], [s.question for s in SAMPLES]
    with pytest.warns(UserWarning, match="no calibration of scorer 'confidence'"):
        assert ask(generator, search="swires", max_new_tokens=20).trace.data["calibration"] is None
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        calibration = generator.calibrate(images, questions, data="five images", max_stage_tokens=LIMITS)
    assert generator.calibrations == {"confidence": calibration}
    answer = ask(generator, search="swires", retrace={}, max_new_tokens=20)
    assert answer.trace.data["calibration"] == {"scorer": "confidence", "data": "five images"}
    with pytest.warns(UserWarning, match="no calibration of scorer 'doubled'"):
        assert ask(generator, search="swires", scorer=doubled, max_new_tokens=20).trace.data["calibration"] is None


def test_the_model_is_left_alone(fresh_tiny, tiny):
    model = fresh_tiny
    inputs = batch(tiny, [SAMPLE])

    def state():
        configs = (model.config, model.config.text_config, model.config.vision_config)
        attention = [config._attn_implementation for config in configs]
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=30).tolist()
        return tokens, attention, [id(parameter) for parameter in model.parameters()], model.training

    before = state()
    generator = SwiresGenerator(model, tiny.processor)
    assert generator.model is model and generator.processor is tiny.processor
    ask(generator)
    assert state() == before


def test_the_engine_has_no_weights_of_its_own(tiny):
    def addresses(model):
        return {name: tensor.data_ptr() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}

    assert addresses(tiny.engine.view._model) == addresses(tiny.model)


def test_what_the_processor_gives_is_what_generate_takes(tiny):
    assert set(batch(tiny, [SAMPLE])) == set(family_of(tiny.model.config).inputs)


class Table(list):
    """As a DataFrame: its length is that of its rows, and its items are its columns."""

    columns = ("question",)


@pytest.mark.parametrize("wrong", [Table("abc"), {"a": "?"}, {"?"}, frozenset("?"), "?", b"?", 3, None], ids=repr)
def test_what_is_no_sequence_of_questions(tiny, wrong):
    with pytest.raises(TypeError, match="questions must be a sequence with one entry for each search, got"):
        tiny.answer_batch([SAMPLE.image], wrong, "greedy", max_new_tokens=2)
    with pytest.raises(TypeError, match="images must be a sequence with one entry for each search, got"):
        tiny.answer_batch(wrong, ["?"], "greedy", max_new_tokens=2)
