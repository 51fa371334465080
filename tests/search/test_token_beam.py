"""Token beam search equals ``model.generate(num_beams=k)``, in sequences and in scores."""

import itertools

import pytest
import torch
from helpers.random_mllama import TINY_SHAPE, build_random_mllama, random_inputs

from llava_cot import TokenBeamConfig
from llava_cot.data import shapes
from llava_cot.prompt import build_inputs
from llava_cot_kernels import OutOfPages

NEAR_TIE = 1e-4  # of scores: two hypotheses so close may change places by rounding


def ours(generator, inputs, **settings):
    return generator.generate(**inputs, search="token_beam", return_dict_in_generate=True, **settings)


def theirs(model, inputs, **settings):
    """Every beam of transformers', so that the scores behind the returned ones are known."""
    return model.generate(
        **inputs, do_sample=False, num_return_sequences=settings["num_beams"], return_dict_in_generate=True,
        output_scores=True, **settings,
    )  # fmt: skip


def assert_equal(got, expected, pad):
    """Row by row; rows may differ only where transformers' own scores of neighbours are NEAR_TIE apart."""
    torch.testing.assert_close(
        got.sequences_scores, expected.sequences_scores[: len(got.sequences_scores)], rtol=0, atol=1e-4
    )
    scores = expected.sequences_scores
    for row, sequence in enumerate(got.sequences):
        if trimmed(sequence, pad) == trimmed(expected.sequences[row], pad):
            continue
        ties = [i for i in range(len(scores)) if i != row and abs(scores[i] - scores[row]) < NEAR_TIE]
        assert any(trimmed(sequence, pad) == trimmed(expected.sequences[i], pad) for i in ties), row
        print(f"excused: beam {row}, its score and another's are closer than {NEAR_TIE}")


def trimmed(sequence, pad):
    tokens = sequence.tolist()
    while tokens and tokens[-1] == pad:
        tokens.pop()
    return tokens


@pytest.mark.parametrize("num_beams", [2, 4, 8])
def test_the_tiny_model(tiny, fresh_tiny, num_beams):
    for seed in range(800_300, 800_303):
        sample = shapes.sample(seed)
        inputs = build_inputs(tiny.processor, sample.image, sample.question, "one")
        settings = {"num_beams": num_beams, "max_new_tokens": 160}
        expected = theirs(fresh_tiny, inputs, **settings)
        got = ours(tiny, inputs, num_return_sequences=2, **settings)
        assert_equal(got, expected, fresh_tiny.generation_config.pad_token_id)
    assert tiny.engine.pages_in_use == tiny.engine.images_in_use == 0


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("length_penalty", [-0.5, 0.0, 1.0, 2.0])
def test_random_models_that_end_anywhere(bare_generator, early_stopping, length_penalty):
    """Several EOS tokens, so that beams end all the time; cut at every length."""
    model, untouched = (build_random_mllama(**TINY_SHAPE, seed=11) for _ in range(2))
    for m in (model, untouched):
        m.generation_config.eos_token_id, m.generation_config.pad_token_id = [3, 7, 11], 0
    generator = bare_generator(model, page_size=4)
    for num_beams, length, limit in itertools.product((1, 2, 5), (1, 17), (1, 2, 17)):
        inputs = random_inputs(model, length=length, ratio_id=1, seed=length)
        settings = {
            "num_beams": num_beams, "max_new_tokens": limit,
            "early_stopping": early_stopping, "length_penalty": length_penalty,
        }  # fmt: skip
        if num_beams == 1:  # transformers' is greedy then; ours must at least run
            assert ours(generator, inputs, **settings).sequences.shape[1] <= length + limit
            continue
        got = ours(generator, inputs, num_return_sequences=num_beams, **settings)
        assert_equal(got, theirs(untouched, inputs, **settings), 0)
    assert generator.engine.pages_in_use == generator.engine.images_in_use == 0


def test_questions_in_one_batch_and_with_few_pages(tiny, bare_generator):
    """The same answers alone, together, beside another search, and when they must take turns for pages."""
    samples = [shapes.sample(seed) for seed in range(800_310, 800_314)]
    images, questions = [s.image for s in samples], [s.question for s in samples]
    config = TokenBeamConfig(num_beams=3, max_new_tokens=120)
    alone = [tiny.answer(*pair, config).tokens for pair in zip(images, questions)]
    assert [a.tokens for a in tiny.answer_batch(images, questions, config)] == alone
    tight = bare_generator(tiny.model, page_size=4, num_pages=140)
    assert [a.tokens for a in tight.answer_batch(images, questions, config)] == alone
    assert tight.engine.pages_in_use == 0
    small = bare_generator(tiny.model, page_size=4, num_pages=20)
    with pytest.raises(OutOfPages, match="too small for this search alone"):
        small.answer(images[0], questions[0], config)
    assert small.engine.pages_in_use == 0


def test_dead_beams_give_their_pages_back(tiny):
    """Three beams hold about three answers' pages, however many were dropped on the way."""
    sample = shapes.sample(800_320)
    tiny.engine.runner.peak_pages = 0
    answer = tiny.answer(sample.image, sample.question, TokenBeamConfig(num_beams=3, max_new_tokens=160))
    prompt = answer.trace.data["prompt_tokens"]
    per_beam = -(-(prompt + len(answer.tokens)) // tiny.engine.pool.page_size)
    assert tiny.engine.runner.peak_pages <= 4 * (per_beam + 1)


def test_the_trace_and_the_cost(tiny):
    sample = shapes.sample(800_321)
    answer = tiny.answer(sample.image, sample.question, "token_beam", num_beams=4, max_new_tokens=160)
    nodes = answer.trace.data["nodes"]
    assert len(nodes) == 4 and [node["kept"] for node in nodes] == [True, False, False, False]
    scores = [node["score"] for node in nodes]
    assert scores == sorted(scores, reverse=True)
    for node in nodes:
        assert len(node["tokens"]) == len(node["logprobs"])
        assert node["score"] == pytest.approx(sum(node["logprobs"]) / len(node["tokens"]), abs=1e-5)
    assert answer.usage.image_encodings == 1
    assert answer.usage.steps <= 160 and answer.usage.decoded_tokens <= 4 * answer.usage.steps


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 0}, "num_beams must be >= 1, got 0"),
        ({"num_return_sequences": 5}, r"num_return_sequences must be in \[1, num_beams=4\], got 5"),
        ({"early_stopping": "soon"}, "early_stopping must be True, False or 'never', got 'soon'"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        TokenBeamConfig(**settings)
