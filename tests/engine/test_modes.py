"""What a model, its inputs and torch's modes may do to an engine: it works, or says at once why not."""

import copy
from functools import cache

import pytest
import torch
from helpers.random_mllama import TINY_SHAPE, build_random_mllama, random_inputs

from llava_cot import EngineConfig, SwiresConfig, SwiresGenerator, TokenBeamConfig
from llava_cot.core import Extend
from llava_cot.data import shapes
from llava_cot.engine.cache import ImageLayer, PagedLayer
from llava_cot.prompt import build_inputs
from llava_cot.search.drive import Drive

SAMPLES = [shapes.sample(seed) for seed in range(808_000, 808_003)]
SEARCHES = {
    "greedy": "greedy",
    "swires": SwiresConfig.published(cutoff=-0.1),
    "best_of_n": "best_of_n",
    "majority": "majority",
    "sentence_beam": "sentence_beam",
    "token_beam": TokenBeamConfig(num_beams=3),
}


@pytest.fixture(scope="module")
def alone(tiny):
    """A function that gives the tokens that a search of 30 gives for each sample, computed once for each search."""
    return cache(
        lambda name: [tiny.answer(s.image, s.question, SEARCHES[name], max_new_tokens=30).tokens for s in SAMPLES]
    )


@pytest.mark.covering(1)
@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -3e38])
def test_a_search_on_a_broken_image_fails_alone(tiny, alone, search, bad):
    """A number that overflows in the vision tower becomes NaN in every logit."""
    prompts = [build_inputs(tiny.processor, s.image, s.question, "one") for s in SAMPLES]
    plan = tiny.plan(SEARCHES[search], max_new_tokens=30)
    expected = alone(search)
    prompts[1] = {**prompts[1], "pixel_values": torch.full_like(prompts[1]["pixel_values"], bad)}
    runs = [tiny.start(prompt, plan, 0) for prompt in prompts]
    tiny.wait(runs)
    assert [tiny.answer_of(runs[i]).tokens for i in (0, 2)] == [expected[0], expected[2]]
    error = tiny.error_of(runs[1])
    assert isinstance(error, ValueError) and "logits must have" in str(error)
    assert tiny.engine.pages_in_use == tiny.engine.images_in_use == 0


@pytest.mark.parametrize("asked", [{}, {"top": 3}, {"want": (1, 2)}])
def test_log_probs_of_given_tokens_are_never_nan(tiny, asked):
    prompts = [build_inputs(tiny.processor, s.image, s.question, "one") for s in SAMPLES[:2]]
    prompts[0] = {**prompts[0], "pixel_values": prompts[0]["pixel_values"] * torch.nan}

    def read():
        (found,) = (yield [Extend(0, (5, 6, 7), **asked)])[0]
        return found.logprobs

    drives = [Drive(tiny.engine.open(prompt), read()) for prompt in prompts]
    while not all(drive.done for drive in drives):
        tiny.engine.step()
    assert isinstance(drives[0].error, ValueError) and "logits must have no NaN" in str(drives[0].error)
    assert len(drives[1].result) == 3 and all(value < 0 for value in drives[1].result)


def test_deterministic_algorithms_do_not_write_every_page(tiny):
    sample = SAMPLES[0]
    expected = tiny.answer(sample.image, sample.question, "greedy", max_new_tokens=20).tokens
    torch.use_deterministic_algorithms(True)
    try:
        generator = SwiresGenerator(tiny.model, tiny.processor)
        assert torch.utils.deterministic.fill_uninitialized_memory
        for buffer in (generator.engine.view.kv_cache, generator.engine.view.images.kv):
            assert not buffer[:, :, -100:].isnan().any(), "torch fills with NaN"
        assert generator.answer(sample.image, sample.question, "greedy", max_new_tokens=20).tokens == expected
        generator.answer(sample.image, sample.question, SwiresConfig.published(), max_new_tokens=60)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def retraced(tiny):
    return tiny.answer(SAMPLES[0].image, SAMPLES[0].question, "swires", cutoff=0.0, max_new_tokens=24).tokens


@pytest.mark.parametrize("used", [torch.inference_mode(True), torch.inference_mode(False), torch.no_grad()])
@pytest.mark.parametrize("made", ["inference", "grad", "loaded in inference"])
def test_modes_of_autograd_where_it_is_made_and_used(tiny, retraced, made, used):
    sample, config = SAMPLES[0], EngineConfig(num_pages=400, steps_per_look=2)
    with torch.inference_mode(made != "grad"):
        model = copy.deepcopy(tiny.model) if made == "loaded in inference" else tiny.model
        generator = SwiresGenerator(model, tiny.processor, engine=config)
        if made == "inference":
            generator.answer(sample.image, sample.question, "greedy", max_new_tokens=3)
    with used:
        for search in ("swires", "token_beam", "sentence_beam"):
            settings = {"cutoff": 0.0} if search == "swires" else {}
            answer = generator.answer(sample.image, sample.question, search, max_new_tokens=24, **settings)
            assert search != "swires" or answer.tokens == retraced
    generator.answer(sample.image, sample.question, "greedy", max_new_tokens=3)


@pytest.mark.parametrize("order", [[3, 1], [5, 1, 3], [1, 3, 3]])
def test_cross_attention_layers_in_any_order(bare_generator, order):
    """A model only asks whether a layer is among them."""
    model = build_random_mllama(**{**TINY_SHAPE, "layers": 6, "cross": order}, seed=5)
    generator = bare_generator(model, page_size=4)
    for length in (5, 33):
        inputs = random_inputs(model, length=length, ratio_id=6, seed=length)
        expected = model.generate(**inputs, do_sample=False, max_new_tokens=12)
        assert torch.equal(generator.generate(**inputs, search="greedy", max_new_tokens=12), expected)


@pytest.mark.parametrize("layer", [PagedLayer, ImageLayer])
@pytest.mark.parametrize("which", [0, 1])
def test_a_model_that_changes_what_it_has_cached_is_refused(tiny, monkeypatch, layer, which):
    update = layer.update

    def changing(self, *states, **kwargs):
        returned = [*update(self, *states, **kwargs)]
        returned[which] = returned[which] * 1.5
        return tuple(returned)

    monkeypatch.setattr(layer, "update", changing)
    with pytest.raises(
        ValueError, match="model must attend to the keys and values that it caches, but a layer changes"
    ):
        tiny.answer(SAMPLES[0].image, SAMPLES[0].question, "greedy", max_new_tokens=4)
    monkeypatch.undo()
    assert tiny.engine.pages_in_use == 0
    tiny.answer(SAMPLES[0].image, SAMPLES[0].question, "greedy", max_new_tokens=4)
