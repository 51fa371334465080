"""``model.generate(custom_generate=generator)`` is ``generator.generate``, and a stream is its answer."""

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from llava_cot import Budget, SwiresConfig
from llava_cot.data import shapes
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
    options = {"add_special_tokens": False, "padding": True, "return_tensors": "pt"}
    return generator.processor(images=images, text=texts, **options)


@pytest.mark.parametrize("search", POLICIES)
def test_it_equals_generate(tiny, search):
    inputs = inputs_of(tiny, *SAMPLES)
    expected = tiny.generate(**inputs, search=search, seed=3, max_new_tokens=50)
    got = tiny.model.generate(**inputs, custom_generate=tiny, search=search, seed=3, max_new_tokens=50)
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
