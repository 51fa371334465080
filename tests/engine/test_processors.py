"""Every search follows the model's generation config as ``model.generate`` does, on its own tokens."""

import copy
import itertools

import pytest
import torch
from helpers.parity import image_tokens_without_a_logit
from helpers.refused_fields import REFUSED_VALUES

from llava_cot import BestOfNConfig, SwiresGenerator
from llava_cot.data import shapes
from llava_cot.engine.generation_config import REFUSED
from llava_cot.prompt import build_inputs

SAMPLES = [shapes.sample(seed) for seed in range(807_000, 807_002)]
LENGTH = 24


@pytest.fixture(scope="module")
def generator(tiny):
    return SwiresGenerator(copy.deepcopy(tiny.model), tiny.processor)


@pytest.fixture(autouse=True)
def as_it_was(generator):
    before = copy.deepcopy(generator.model.generation_config)
    yield
    generator.model.generation_config = before


def plain(generator, sample):
    inputs = build_inputs(generator.processor, sample.image, sample.question, "one")
    with image_tokens_without_a_logit():
        out = generator.model.generate(
            **inputs, attention_mask=torch.ones_like(inputs["input_ids"]), do_sample=False, max_new_tokens=LENGTH
        )
    return out[0, inputs["input_ids"].shape[1] :].tolist()


def ask(generator, sample, search="greedy", **settings):
    return generator.answer(sample.image, sample.question, search, max_new_tokens=LENGTH, **settings)


FIELDS = {
    "repetition_penalty": lambda plain, eos: 1.3,
    "no_repeat_ngram_size": lambda plain, eos: 2,
    "bad_words_ids": lambda plain, eos: [[plain[3]], plain[6:8]],
    "suppress_tokens": lambda plain, eos: [plain[0], plain[5]],
    "begin_suppress_tokens": lambda plain, eos: [plain[0]],
    "sequence_bias": lambda plain, eos: [[[plain[2]], -20.0]],
    "min_new_tokens": lambda plain, eos: LENGTH - 1,
    "min_length": lambda plain, eos: 40,
    "exponential_decay_length_penalty": lambda plain, eos: (3, 1.6),
    "remove_invalid_values": lambda plain, eos: True,
}


@pytest.mark.parametrize("field", FIELDS)
def test_greedy_is_generate(generator, field):
    config, changed = generator.model.generation_config, 0
    before = [ask(generator, sample).tokens for sample in SAMPLES]
    if field.startswith("min_"):  # so that there is an end to be put off
        config.eos_token_id = before[0][9]
        before = [ask(generator, sample).tokens for sample in SAMPLES]
    setattr(config, field, FIELDS[field](before[0], config.eos_token_id))
    together = generator.answer_batch(
        [s.image for s in SAMPLES], [s.question for s in SAMPLES], "greedy", max_new_tokens=LENGTH
    )
    for sample, old, answer in zip(SAMPLES, before, together):
        assert answer.tokens == plain(generator, sample)
        changed += answer.tokens != old
    assert changed or field == "remove_invalid_values", "or the field shows nothing"
    setattr(config, field, None)
    assert [ask(generator, sample).tokens for sample in SAMPLES] == before


def test_candidates_are_processed_by_their_own_tokens(generator):
    """No candidate, of any stage and any question, has two tokens twice in a row; alone or together they are equal."""
    generator.model.generation_config.no_repeat_ngram_size = 2
    images, questions = [s.image for s in SAMPLES], [s.question for s in SAMPLES]
    for search in (BestOfNConfig(n=3, max_new_tokens=LENGTH), "swires", "sentence_beam"):
        together = generator.answer_batch(images, questions, search, max_new_tokens=LENGTH)
        for sample, answer in zip(SAMPLES, together):
            prompt = build_inputs(generator.processor, sample.image, sample.question, "one")["input_ids"][0].tolist()
            for id in answer.trace.nodes:
                path = prompt + [token for node in answer.trace.path(id) for token in node["tokens"]]
                drawn = list(itertools.pairwise(path))[len(prompt) - 1 :]
                assert not set(drawn).intersection(itertools.pairwise(prompt)) and len(drawn) == len(set(drawn))
        assert together[1].tokens == ask(generator, SAMPLES[1], search).tokens


@pytest.mark.parametrize("field", REFUSED)
def test_what_no_search_follows_is_refused(generator, field):
    setattr(generator.model.generation_config, field, REFUSED_VALUES[field])
    with pytest.raises(ValueError, match=rf"generation_config\.{field} is not supported by a search, got "):
        ask(generator, SAMPLES[0])
    assert generator.engine.pages_in_use == 0


def test_token_beams_refuse_processors(generator):
    generator.model.generation_config.repetition_penalty = 1.2
    with pytest.raises(ValueError, match="search='token_beam' can't apply the logits processors of the model"):
        ask(generator, SAMPLES[0], "token_beam")


def test_a_wrong_value_is_named(generator):
    generator.model.generation_config.repetition_penalty = -1.0
    with pytest.raises(ValueError, match=r"penalty.* -1\.0"):
        ask(generator, SAMPLES[0])
