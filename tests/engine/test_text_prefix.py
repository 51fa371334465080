"""Models whose images are tokens of the prompt: the same engine, and the same tokens as from pixels by transformers."""

from functools import partial

import pytest
import torch
from helpers.jobs import Job, run
from helpers.padding import left_padded
from helpers.random_llava import FAMILIES, IMAGE_SIZE, PATCH_SIZE, build_random_llava
from helpers.reference_loop import PublishedWay, swires
from transformers import AutoProcessor, LlamaConfig, LlamaForCausalLM, LlavaForConditionalGeneration, LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from llava_cot import STAGES, SwiresConfig, SwiresGenerator
from llava_cot.core import Expand, SamplingParams
from llava_cot.data import shapes
from llava_cot.engine.config import EngineConfig
from llava_cot.engine.engine import Engine
from llava_cot.families import family_of
from llava_cot.prompt import build_inputs, split_rows
from llava_cot_kernels.stage_tags import StageTags

PARAMS = SamplingParams(temperature=1.1, top_p=0.9)
LIMITS = dict(zip(STAGES, (5, 6, 7, 4)))  # a random model closes no stage
SEARCH = SwiresConfig.published(
    max_new_tokens=40, max_stage_tokens=LIMITS, cutoff=0.0, temperature=1.1, top_p=0.9
)  # no mean log-prob is above 0: it retraces until it may no more


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    """(model for the engine, one that the engine never saw, a function that makes inputs)"""
    build, make_inputs = FAMILIES[request.param]
    model, untouched = build(seed=3), build(seed=3)
    return model, untouched, partial(make_inputs, model)


def assert_nothing_held(generator):
    assert (generator.engine.pages_in_use, generator.engine.images_in_use) == (0, 0)


def assert_same_search(answer, plain):
    """Every node's place, tokens, score and fate."""
    nodes = answer.trace.data["nodes"]
    assert [n["tokens"] for n in nodes] == [n.text.tokens for n in plain.nodes]
    places = [(n.parent.id if n.parent else 0, n.stage, n.round, n.index, n.kept) for n in plain.nodes]
    assert [(n["parent"], n["stage"], n["round"], n["index"], n["kept"]) for n in nodes] == places
    assert [n["score"] for n in nodes] == pytest.approx([n.score for n in plain.nodes], abs=1e-4)
    assert answer.tokens == plain.answer.tokens()


def test_greedy(bare_generator, family, is_full):
    """With pages of every size in turn, around their boundaries. ``test_check`` has every size for every family."""
    model, untouched, make_inputs = family
    generators = [bare_generator(model, page_size=page_size) for page_size in (1, 4, 16)]
    changed = 0
    for at, (length, images) in enumerate(((12, 1), (16, 1), (17, 1), (64, 3), (131, 2))):
        inputs = make_inputs(length=length, images=images, seed=length)
        expected = untouched.generate(**inputs, do_sample=False, max_new_tokens=18)
        for generator in generators if is_full else (generators[at % 3],):
            got = generator.generate(**inputs, search="greedy", max_new_tokens=18)
            assert torch.equal(got, expected), (length, generator.engine.pool.page_size)
        inputs["pixel_values"] = -inputs["pixel_values"]
        changed += not torch.equal(generators[0].generate(**inputs, search="greedy", max_new_tokens=18), expected)
    assert changed >= 4  # the model sees
    for generator in generators:
        assert_nothing_held(generator)


@pytest.mark.covering(1)
@pytest.mark.parametrize("search", ["greedy", "sample", SEARCH], ids=["greedy", "sample", "swires"])
def test_two_questions_at_once(bare_generator, family, search):
    model, _, make_inputs = family
    generator = bare_generator(model, page_size=4)
    rows = [make_inputs(length=20, images=1, seed=5), make_inputs(length=33, images=2, seed=6)]
    settings = dict(search=search, seed=1, max_new_tokens=40, return_dict_in_generate=True)
    together = generator.generate(**left_padded(family_of(model.config), rows), **settings)
    for row, answer in zip(rows, together.answers):
        alone = generator.generate(**row, **settings).answers[0]
        assert answer.tokens == alone.tokens
        assert [n["tokens"] for n in answer.trace.data["nodes"]] == [n["tokens"] for n in alone.trace.data["nodes"]]
    assert_nothing_held(generator)


def test_forks_and_going_back(tiny, family):
    """Candidates of the prompt, of one of them, and again of the prompt, against each drawn from pixels."""
    model, untouched, make_inputs = family
    inputs = make_inputs(length=19, seed=4)
    way = PublishedWay(untouched, tiny.processor.tokenizer, inputs)
    tags = StageTags.from_tokenizer(tiny.processor.tokenizer, ["</SUMMARY>"])
    engine = Engine(model, tags, config=EngineConfig(page_size=4))
    decode = engine.view.decode

    def decoding(token_ids, positions, batch, **kwargs):
        assert not batch.is_prefill  # flash-attn would take what it is given for all the keys there are
        return decode(token_ids, positions, batch, **kwargs)

    engine.view.decode = decoding

    def program(root):
        (first,) = yield [Expand(root.id, (1, 2, 3), PARAMS, 6)]
        second, third = yield [Expand(first[1].id, (4, 5), PARAMS, 7), Expand(first[2].id, (6,), PARAMS, 3)]
        (back,) = yield [Expand(root.id, (7, 8), PARAMS, 5)]
        (again,) = yield [Expand(first[1].id, (4, 9), PARAMS, 7)]
        return [*first, *second, *third, *back, *again]

    job = Job(split_rows(inputs, model.config)[0], program)
    run(engine, [job])
    for branch in job.result:
        (plain,) = way.draw(branch.parent.path(), [branch.seed], PARAMS, len(branch.tokens))
        assert branch.tokens == plain.tokens
        assert branch.logprobs == pytest.approx(plain.logprobs, abs=1e-4)
        assert branch.image == -1
    assert job.result[3].tokens == job.result[8].tokens  # the same parent under the same seed
    assert job.usage.prompt_tokens == 19 and engine.pages_in_use == 0


def test_swires_that_retraces(tiny, bare_generator, family, is_full):
    model, untouched, make_inputs = family
    generator = bare_generator(model, page_size=4)
    for seed in (1, 2) if is_full else (1,):
        inputs = make_inputs(length=18 + seed, seed=seed)
        (answer,) = generator.generate(**inputs, search=SEARCH, seed=7, return_dict_in_generate=True).answers
        way = PublishedWay(untouched, tiny.processor.tokenizer, inputs)
        plain = swires(way, SEARCH, cutoff=lambda stage: 0.0, seed=7)
        assert len(plain.retraces) == 2
        assert_same_search(answer, plain)
    assert_nothing_held(generator)


def test_a_folder_with_a_processor(tiny, tmp_path):
    """``from_pretrained`` and ``answer`` on a LLaVA whose chat template writes no BOS."""
    tokenizer = tiny.processor.tokenizer
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    )
    processor = LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        image_token="<|image|>",
        num_additional_image_tokens=1,
        chat_template=tiny.processor.chat_template.replace("{{ bos_token }}", ""),
    )
    image_token = tokenizer.convert_tokens_to_ids("<|image|>")
    build_random_llava(vocab=len(tokenizer), image_token=image_token).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    generator = SwiresGenerator.from_pretrained(tmp_path, grammar="llava-cot", engine=EngineConfig(page_size=4))
    assert type(generator.model) is LlavaForConditionalGeneration
    samples = [shapes.sample(seed) for seed in (1, 2)]
    answers = generator.answer_batch([s.image for s in samples], [s.question for s in samples], SEARCH, seed=3)
    untouched = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    for sample, answer in zip(samples, answers):
        inputs = build_inputs(AutoProcessor.from_pretrained(tmp_path), sample.image, sample.question, "one")
        is_bos = inputs["input_ids"][0] == tokenizer.bos_token_id
        assert is_bos[0] and is_bos.sum() == 1
        assert answer.trace.data["prompt_tokens"] == inputs["input_ids"].shape[1]
        plain = swires(PublishedWay(untouched, tokenizer, inputs), SEARCH, cutoff=lambda stage: 0.0, seed=3)
        assert_same_search(answer, plain)
    assert_nothing_held(generator)


def test_other_models_are_refused(bare_generator):
    model = LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
    with pytest.raises(ValueError, match=r"model must be one of \[.*'llava', .*'qwen3_vl'.*\], got .*'llama'"):
        bare_generator(model)
    model = build_random_llava()
    for kind, needs in (
        ("chunked", "attention that begins at multiples of the chunk"),
        ("linear", "a recurrent state"),
    ):
        model.config.text_config.layer_types = ["full_attention", f"{kind}_attention", "full_attention"]
        message = rf"only layers of \['full_attention', 'sliding_attention'\], got llama with '{kind}_.*needs {needs}"
        with pytest.raises(ValueError, match=message):
            bare_generator(model)


def test_a_window_that_is_only_in_the_mask_is_refused(bare_generator):
    """The engine makes its own masks: it would read everything, and give another answer."""
    build, make_inputs = FAMILIES["llava"]
    model = build()
    model.config.text_config.sliding_window = 16
    generator = bare_generator(model)
    message = "model must tell its attention function the window of a layer, but llama does not"
    with pytest.raises(ValueError, match=message):
        generator.generate(**make_inputs(model, length=20, seed=0), search="greedy")
    assert_nothing_held(generator)


def cut(inputs, name, by=1):
    return {**inputs, name: inputs[name][:-by]}


BAD_INPUTS = {
    "llava, no pixels": ("llava", lambda i: {**i, "pixel_values": None}, "pixel_values must be given"),
    "llava, no image": (
        "llava",
        lambda i: {**i, "input_ids": i["input_ids"].clamp(max=90)},
        "pixel_values must have the images of input_ids=0",
    ),
    "llava, half an image": (
        "llava",
        lambda i: {
            **i,
            "pixel_values": i["pixel_values"].repeat(2, 1, 1, 1)[:3],
            "input_ids": i["input_ids"].repeat(2, 1),
            "attention_mask": None,
        },
        r"input_ids\[0\] must have its images' tokens=10, got 8 image tokens",
    ),
    "qwen, no grids": ("qwen2_5_vl", lambda i: {**i, "image_grid_thw": None}, "image_grid_thw must be given"),
    "qwen, a patch too few": ("qwen2_5_vl", lambda i: cut(i, "pixel_values"), "pixel_values must have .*=28 .* got 27"),
    "qwen, a mask too many": (
        "qwen2_5_vl",
        lambda i: {**i, "attention_mask": i["attention_mask"].repeat(2, 1)},
        "attention_mask must have batch=1",
    ),
    "qwen, a mask too short": (
        "qwen2_5_vl",
        lambda i: {**i, "attention_mask": i["attention_mask"][:, 1:]},
        "attention_mask must have tokens=20 in dimension 1, got 19",
    ),
    "qwen, images left over": (
        "qwen2_5_vl",
        lambda i: {
            "input_ids": i["input_ids"][:, :3],
            **{name: i[name] for name in ("pixel_values", "image_grid_thw")},
        },
        "pixel_values must have the images of input_ids=1, got 2",
    ),
}


def test_an_image_too_few(bare_generator):
    """How many tokens an image of a LLaVA is, only its model knows."""
    build, make_inputs = FAMILIES["llava"]
    generator = bare_generator(build())
    inputs = make_inputs(generator.model, length=20, seed=0, images=2)
    with pytest.raises(ValueError, match="Image features and image tokens do not match"):
        generator.generate(**cut(inputs, "pixel_values"), search="greedy")
    assert_nothing_held(generator)


@pytest.mark.parametrize("model_type, spoil, message", BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_bad_inputs(model_type, spoil, message):
    build, make_inputs = FAMILIES[model_type]
    model = build()
    inputs = spoil(make_inputs(model, length=20, seed=0, images=2))
    with pytest.raises(ValueError, match=message):
        split_rows(inputs, model.config)


@pytest.mark.filterwarnings("ignore:no calibration")
def test_custom_generate_is_refused(bare_generator, family):
    """There transformers has encoded the images already, or repeats what has no row for each prompt."""
    model, _, make_inputs = family
    with pytest.raises(
        ValueError, match=r"model must be one of \['mllama'\], got model_type .*: call generator.generate"
    ):
        model.generate(**make_inputs(length=20, seed=0), custom_generate=bare_generator(model), max_new_tokens=4)
