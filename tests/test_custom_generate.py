"""``model.generate(custom_generate=generator)`` is ``generator.generate``, and a stream is its answer."""

import copy

import numpy as np
import pytest
import torch
from helpers.parity import image_tokens_without_a_logit
from helpers.refused_fields import REFUSED_VALUES
from transformers import (
    CompileConfig,
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
)

from llava_cot import Budget, SwiresConfig, SwiresGenerator
from llava_cot.custom_generate import arguments
from llava_cot.data import shapes
from llava_cot.engine import generation_config
from llava_cot.engine.generation_config import ARGUMENTS, FOLLOWED, IRRELEVANT, OUTPUTS, REFUSED, SETTINGS
from llava_cot.prompt import build_inputs
from llava_cot.search import POLICIES
from llava_cot.search.events import StageFinal, TextDelta

SAMPLES = [shapes.sample(seed) for seed in (802_000, 802_010)]


def inputs_of(generator, *samples):
    chats = [
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": sample.question}]}]
        for sample in samples
    ]
    texts = [generator.processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
    images = [[sample.image] for sample in samples]
    options = {"add_special_tokens": False, "padding": True, "padding_side": "left", "return_tensors": "pt"}
    return generator.processor(images=images, text=texts, **options)


@pytest.fixture(scope="module")
def generator_of_a_copy(tiny):
    return SwiresGenerator(copy.deepcopy(tiny.model), tiny.processor)


@pytest.fixture
def own(generator_of_a_copy):
    """A generator whose generation configuration may be changed."""
    before = copy.deepcopy(generator_of_a_copy.model.generation_config)
    yield generator_of_a_copy
    generator_of_a_copy.model.generation_config = before


@pytest.mark.parametrize("search", POLICIES)
def test_it_equals_generate(tiny, search):
    inputs = inputs_of(tiny, *SAMPLES)
    expected = tiny.generate(**inputs, search=search, seed=3, max_new_tokens=24)
    got = tiny.model.generate(**inputs, custom_generate=tiny, search=search, seed=3, max_new_tokens=24)
    assert torch.equal(got, expected)


def test_transformers_own_arguments(tiny):
    inputs = inputs_of(tiny, SAMPLES[0])
    beams = tiny.model.generate(**inputs, custom_generate=tiny, search="token_beam", num_beams=3, max_new_tokens=160)
    assert torch.equal(beams, tiny.model.generate(**inputs, num_beams=3, max_new_tokens=160))
    sampled = {"do_sample": True, "temperature": 0.9, "top_p": 0.8, "num_return_sequences": 3, "max_new_tokens": 160}
    got = tiny.model.generate(**inputs, custom_generate=tiny, search="sample", seed=1, **sampled)
    expected = tiny.generate(**inputs, search="sample", seed=1, top_k=0, **sampled)
    assert torch.equal(got, expected) and len(got) == 3
    whole = tiny.model.generate(
        **inputs,
        custom_generate=tiny,
        search=SwiresConfig.published(cutoff=-1.0),
        seed=2,
        settings={"num_return_sequences": 2, "scorer": "tail"},
        max_new_tokens=160,
        return_dict_in_generate=True,
    )
    assert whole.answers[0].trace.data["config"]["scorer"] == "tail"
    assert whole.answers[0].stages["CAPTION"].text and len(whole.sequences_scores) == len(whole.sequences)
    length = inputs["input_ids"].shape[1] + 40
    assert tiny.model.generate(**inputs, custom_generate=tiny, search="greedy", max_length=length).shape[1] == length


class Ban(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores


def test_what_it_can_not_do_it_says(tiny, fresh_tiny):
    inputs = inputs_of(tiny, SAMPLES[0])
    with pytest.raises(ValueError, match="logits_processor is not supported by a search, got Ban"):
        tiny.model.generate(**inputs, custom_generate=tiny, logits_processor=LogitsProcessorList([Ban()]))
    with pytest.raises(ValueError, match="model must be the generator's own model, got another one"):
        fresh_tiny.generate(**inputs, custom_generate=tiny)
    with pytest.raises(ValueError, match="candidates is not supported by search='greedy'"):
        tiny.model.generate(**inputs, custom_generate=tiny, search="greedy", settings={"candidates": 2})
    assert tiny.engine.pages_in_use == 0


@pytest.mark.parametrize("search", POLICIES)
def test_the_final_events_of_a_stream_are_the_answer(tiny, search):
    """Of one question without a budget, and of another with one: the two do not act on each other."""
    for sample, budget in zip(SAMPLES, (None, Budget(generated_tokens=100))):
        settings = {"seed": 4, "max_new_tokens": 160, "budget": budget}
        *events, finished = tiny.stream(sample.image, sample.question, search, **settings)
        final = [event.text for event in events if isinstance(event, StageFinal)]
        typed = [event.text for event in events if isinstance(event, TextDelta)]
        assert "".join(final) == finished.answer.text
        assert bool(typed) == (search in ("greedy", "sample")) and "".join(typed) in ("", finished.answer.text)


def test_a_stream_is_of_one_answer(tiny):
    with pytest.raises(ValueError, match="num_return_sequences must be 1 in a stream, got 2"):
        next(tiny.stream(SAMPLES[0].image, SAMPLES[0].question, "sample", num_return_sequences=2))


@pytest.mark.parametrize("search", ["best_of_n", "majority", "stage_beam", "swires", "sentence_beam"])
def test_several_answers_are_distinct_and_the_best_is_first(tiny, search):
    inputs = build_inputs(tiny.processor, SAMPLES[0].image, SAMPLES[0].question, "one")
    settings = {"search": search, "seed": 0, "temperature": 1.0, "top_p": 1.0, "max_new_tokens": 160}
    if search == "swires":
        settings["keep"] = 3  # the conclusions of one reasoning are mostly equal
    out = tiny.generate(**inputs, num_return_sequences=3, return_dict_in_generate=True, **settings)
    assert 1 < len(out.sequences) <= 3 and len({answer.text for answer in out.answers}) == len(out.answers)
    best = tiny.generate(**inputs, **settings)
    assert torch.equal(out.sequences[:1, : best.shape[1]], best)
    if search != "majority":  # whose order is that of votes
        assert out.sequences_scores.tolist() == sorted(out.sequences_scores.tolist(), reverse=True)
    ids = out.answers[0].trace.data["answers"]
    assert [answer.trace.data["answer"] for answer in out.answers] == ids


# A value of each field of a generation configuration at which it would do something
FIELDS = {
    "eos_token_id": [3, 481],
    "repetition_penalty": 1.3,
    "no_repeat_ngram_size": 2,
    "bad_words_ids": [[3]],
    "suppress_tokens": [3],
    "begin_suppress_tokens": [3],
    "sequence_bias": [[[3], -2.0]],
    "min_length": 60,
    "min_new_tokens": 10,
    "exponential_decay_length_penalty": (3, 1.6),
    "remove_invalid_values": True,
    "renormalize_logits": True,
    "forced_bos_token_id": 3,
    "do_sample": True,
    "temperature": 0.7,
    "top_k": 5,
    "top_p": 0.8,
    "min_p": 0.1,
    "num_beams": 3,
    "num_return_sequences": 2,
    "length_penalty": -2.0,
    "early_stopping": True,
    "max_length": 60,
    "max_new_tokens": 9,
    "pad_token_id": 5,
    "return_dict_in_generate": True,
    **REFUSED_VALUES,
    "output_attentions": True,
    "output_hidden_states": True,
    "output_scores": True,
    "output_logits": True,
    "use_cache": False,
    "cache_implementation": "static",
    "cache_config": {},
    "max_cache_len": 300,
    "low_memory": True,
    "prefill_chunk_size": 8,
    "compile_config": CompileConfig(),
    "disable_compile": True,
    "transformers_version": "9.9",
    "bos_token_id": 3,
    "decoder_start_token_id": 3,
    "use_mtp": True,
    "speculation_type": "dflash",
    "prompt_lookup_num_tokens": 3,
    "max_matching_ngram_size": 3,
    "num_assistant_tokens": 3,
    "num_assistant_tokens_schedule": "heuristic",
    "assistant_confidence_threshold": 0.1,
    "assistant_early_exit": 1,
    "assistant_lookbehind": 3,
    "target_lookbehind": 3,
    "continuous_batching_config": None,  # deprecated: another value only warns
}
TABLES = (FOLLOWED, SETTINGS, ARGUMENTS, REFUSED, OUTPUTS, IRRELEVANT)


def public_fields():
    return {name for name in vars(GenerationConfig()) if not name.startswith("_")}


def prepared(model, inputs, **given):
    """The configuration and the inputs that transformers gives to a custom function."""
    seen = {}

    def custom(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        seen.update(config=generation_config, kwargs=kwargs)
        return input_ids

    model.generate(**inputs, custom_generate=custom, **{"max_new_tokens": 6, **given})
    return seen["config"], seen["kwargs"]


def test_every_field_of_a_generation_config_is_in_one_table():
    """One that a new version of transformers adds is named here."""
    assert public_fields() <= set(FIELDS), "add it to a table of engine/generation_config.py and to FIELDS"
    for name in FIELDS:
        assert sum(name in table for table in TABLES) == 1, name


def test_a_field_that_nobody_knows_is_refused(tiny, monkeypatch):
    inputs = inputs_of(tiny, SAMPLES[0])
    plain = tiny.model.generate(**inputs, custom_generate=tiny, search="greedy", max_new_tokens=6)
    for name in ("max_cache_len", "num_assistant_tokens", "early_stopping"):
        monkeypatch.setattr(generation_config, "KNOWN", generation_config.KNOWN - {name})
        generation_config._unknown.cache_clear()
        call = {"custom_generate": tiny, "search": "greedy", "max_new_tokens": 6}
        assert torch.equal(tiny.model.generate(**inputs, **call), plain)
        with pytest.raises(ValueError, match=f"{name} is not supported by a search, got "):
            tiny.model.generate(**inputs, **call, **{name: FIELDS[name]})
        monkeypatch.undo()
        generation_config._unknown.cache_clear()


@pytest.mark.parametrize("name", [*FOLLOWED, *REFUSED, *sorted(OUTPUTS)])
def test_a_field_of_the_call_that_no_search_takes(tiny, name):
    inputs = inputs_of(tiny, SAMPLES[0])
    config, kwargs = prepared(tiny.model, inputs)
    arguments(tiny.model, inputs["input_ids"], config, kwargs, [])
    setattr(config, name, FIELDS[name])
    message = f"{name} must be that of model.generation_config=" if name in FOLLOWED else f"{name} is not supported by"
    with pytest.raises(ValueError, match=message):
        arguments(tiny.model, inputs["input_ids"], config, kwargs, [])


@pytest.mark.parametrize("name", ["eos_token_id", "repetition_penalty", "suppress_tokens", "output_scores", "max_time"])
def test_the_call_itself_refuses_it(tiny, name):
    with pytest.raises(ValueError, match=f"{name} (must be that of|is not supported)"):
        tiny.model.generate(
            **inputs_of(tiny, SAMPLES[0]), custom_generate=tiny, search="greedy", **{name: FIELDS[name]}
        )


@pytest.mark.parametrize("name", FOLLOWED)
def test_a_field_of_the_model_is_followed(own, name):
    """Also where the call says the same again."""
    inputs = inputs_of(own, *SAMPLES)
    setattr(own.model.generation_config, name, FIELDS[name])
    with image_tokens_without_a_logit():
        expected = own.model.generate(**inputs, do_sample=False, max_new_tokens=20)
    for again in ({}, {name: FIELDS[name]}):
        got = own.model.generate(**inputs, custom_generate=own, search="greedy", max_new_tokens=20, **again)
        assert torch.equal(got, expected)


@pytest.mark.parametrize("name", sorted(IRRELEVANT - {"continuous_batching_config"}))
def test_how_transformers_computes_changes_nothing(tiny, name):
    inputs = inputs_of(tiny, SAMPLES[0])
    config, kwargs = prepared(tiny.model, inputs)
    plain = arguments(tiny.model, inputs["input_ids"], config, kwargs, [])
    setattr(config, name, FIELDS[name])
    changed = arguments(tiny.model, inputs["input_ids"], config, kwargs, [])
    assert all(torch.equal(changed[key], plain[key]) for key in inputs if key in plain)
    assert {key: value for key, value in changed.items() if key not in inputs} == {
        key: value for key, value in plain.items() if key not in inputs
    }


@pytest.mark.parametrize(
    "search, settings",
    [
        ("sample", {"do_sample": True, "temperature": 0.7, "top_k": 5, "top_p": 0.8, "min_p": 0.1}),
        ("token_beam", {"num_beams": 3, "length_penalty": -2.0, "early_stopping": True}),
        ("best_of_n", {"do_sample": True, "num_return_sequences": 2}),
    ],
)
def test_a_setting_of_the_call_is_one_of_the_search(tiny, search, settings):
    inputs = inputs_of(tiny, SAMPLES[0])
    call = {"search": search, "max_new_tokens": 30, "return_dict_in_generate": True}
    answer = tiny.model.generate(**inputs, custom_generate=tiny, **call, **settings).answers[0]
    found = answer.trace.data["config"]
    assert {name: found[name] for name in settings if name != "do_sample"} == {
        name: value for name, value in settings.items() if name != "do_sample"
    }
    for name in {"length_penalty", "min_p", "num_beams"} - set(found):
        with pytest.raises(ValueError, match=f"{name} is not supported by search='{search}'"):
            tiny.model.generate(**inputs, custom_generate=tiny, **call, **{name: FIELDS[name]})


@pytest.mark.parametrize("settings", [{"length_penalty": -3.0}, {"length_penalty": 2.0}, {"early_stopping": True}])
def test_beams_take_what_beams_of_transformers_take(tiny, settings):
    inputs = inputs_of(tiny, SAMPLES[0])
    call = {**inputs, "num_beams": 4, "max_new_tokens": 60, **settings}
    assert torch.equal(
        tiny.model.generate(**call, custom_generate=tiny, search="token_beam"), tiny.model.generate(**call)
    )


def test_the_settings_of_the_model_are_defaults(own):
    """A search takes those that it has. The call may say otherwise."""
    inputs, config = inputs_of(own, SAMPLES[0]), own.model.generation_config
    config.do_sample, config.temperature, config.top_p = True, 0.7, 0.8
    call = {"custom_generate": own, "max_new_tokens": 8, "return_dict_in_generate": True}
    own.model.generate(**inputs, search="greedy", **call)
    for given, temperature in (({}, 0.7), ({"temperature": 1.0}, 1.0), ({"temperature": 0.4}, 0.4)):
        answer = own.model.generate(**inputs, search="sample", **call, **given).answers[0]
        assert (answer.trace.data["config"]["temperature"], answer.trace.data["config"]["top_p"]) == (temperature, 0.8)
    with pytest.raises(ValueError, match="do_sample must be True with search='sample', got False"):
        own.model.generate(**inputs, search="sample", do_sample=False, **call)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"logits_processor": [Ban()]}, "logits_processor is not supported by a search, got Ban"),
        ({"logits_processor": [TopKLogitsWarper(3)]}, "logits_processor .* got TopKLogitsWarper"),
        ({"logits_processor": [TemperatureLogitsWarper(0.5)]}, "logits_processor .* got TemperatureLogitsWarper"),
        ({"prefix_allowed_tokens_fn": lambda row, ids: [3]}, "logits_processor .* got PrefixConstrained"),
        ({"stopping_criteria": [EosTokenCriteria(438)]}, "stopping_criteria is not .* got EosTokenCriteria"),
        ({"stopping_criteria": [MaxLengthCriteria(30)]}, "stopping_criteria is not .* got MaxLengthCriteria"),
        ({"position_ids": torch.arange(3, 28)[None]}, "position_ids is not supported by a search"),
        ({"labels": torch.zeros(1, 25)}, "labels is not supported by a search, got one of type Tensor"),
        ({"settings": {"candidates"}}, r"settings must be a mapping or None, got \{'candidates'\}"),
    ],
)
def test_what_is_the_callers_own_is_refused(tiny, given, message):
    inputs = inputs_of(tiny, SAMPLES[0])
    lists = {"logits_processor": LogitsProcessorList, "stopping_criteria": StoppingCriteriaList}
    given = {name: lists[name](value) if name in lists else value for name, value in given.items()}
    if "position_ids" in given:
        given["position_ids"] = torch.arange(1, inputs["input_ids"].shape[1] + 1)[None]
    with pytest.raises((TypeError, ValueError), match=message):
        tiny.model.generate(**inputs, custom_generate=tiny, search="sample", do_sample=True, temperature=0.6, **given)
    assert tiny.engine.pages_in_use == 0


def test_a_processor_that_transformers_would_make_too(tiny):
    inputs = inputs_of(tiny, SAMPLES[0])
    call = {"search": "sample", "seed": 1, "do_sample": True, "temperature": 0.5, "max_new_tokens": 9}
    own = LogitsProcessorList([TemperatureLogitsWarper(0.5)])
    got = tiny.model.generate(**inputs, custom_generate=tiny, logits_processor=own, **call)
    assert torch.equal(got, tiny.model.generate(**inputs, custom_generate=tiny, **call))


@pytest.mark.covering(1)
@pytest.mark.parametrize("search", POLICIES)
@pytest.mark.parametrize("form", [int, tuple, torch.tensor, np.array], ids=["int", "tuple", "tensor", "array"])
def test_an_end_that_is_set_later_ends_every_search(own, search, form):
    sample = SAMPLES[0]
    settings = {"seed": 5, "max_new_tokens": 24}
    whole = own.answer(sample.image, sample.question, search, **settings)
    end = whole.tokens[6]
    own.model.generation_config.eos_token_id = end if form is int else form([end, 481])
    answer = own.answer(sample.image, sample.question, search, **settings)
    ends = [place for place, token in enumerate(answer.tokens) if token in (end, 481)]
    assert ends in ([], [len(answer.tokens) - 1]) and answer.tokens != whole.tokens


@pytest.mark.parametrize("end", ["</s>", [481, "</s>"], 4.5])
def test_an_end_that_is_no_token(own, end):
    own.model.generation_config.eos_token_id = end
    with pytest.raises(TypeError, match="eos_token_id must be int or a list of int, got "):
        own.answer(SAMPLES[0].image, SAMPLES[0].question, "greedy", max_new_tokens=3)
