"""Quantised models on the engine: the tokens of their own ``generate``, with weights that are shared, not changed."""

import copy

import pytest
import torch
from helpers.parity import greedy_differences
from helpers.random_llava import FAMILIES
from helpers.random_mllama import build_random_mllama, random_inputs
from torch import nn
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

from llava_cot import SwiresGenerator
from llava_cot.core import Expand, SamplingParams
from llava_cot.data import shapes
from llava_cot.engine.follow import state_of
from llava_cot.engine.model import copy_around_tensors
from llava_cot.engine.plan import memory_plan
from llava_cot.engine.threads import threads_for
from llava_cot.prompt import split_rows
from llava_cot.quantize import LAYERS, QUANTIZATIONS, decoder_matrices, loading_settings
from llava_cot.search.drive import Drive

pytest.importorskip("torchao")
pytest.importorskip("bitsandbytes")
pytest.importorskip("accelerate")

SHAPE = dict(hidden=128, layers=4, heads=4, kv_heads=2, cross=[1, 3], vocab=97)
# bfloat16 rounds logits of up to 10 to 1/32. Attention and SDPA differ by a few such steps.
NEAR_TIE = {torch.float32: 1e-4, torch.bfloat16: 0.13}
CASES = [("int8", torch.float32), ("int8", torch.bfloat16), ("int4", torch.bfloat16), ("nf4", torch.float32)]
PROMPTS = ((1, 1), (17, 6), (64, 1))  # tokens, and the aspect ratio id of one tile or four


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    build_random_mllama(**SHAPE, seed=0, std=0.15).save_pretrained(path)
    return path


def load(folder, name, dtype):
    model = AutoModelForImageTextToText.from_pretrained(folder)
    return AutoModelForImageTextToText.from_pretrained(folder, **loading_settings(name, model.config, dtype, "cpu"))


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def case(request, folder):
    """(a quantised model, a copy of it that no engine sees)"""
    model = load(folder, *request.param)
    return model, copy.deepcopy(model)


def tensors_in(root):
    """Every tensor that ``root`` reaches by attributes, containers and the parts of subclasses, by id."""
    found, seen, todo = {}, set(), [root]
    while todo:
        each = todo.pop()
        if id(each) in seen or isinstance(each, (type, str, bytes, int, float)):
            continue
        seen.add(id(each))
        if isinstance(each, torch.Tensor):
            found[id(each)] = each
        if isinstance(each, dict):
            todo.extend(each.values())
        elif isinstance(each, (list, tuple, set)):
            todo.extend(each)
        elif not isinstance(each, torch.Size):
            todo.extend(getattr(each, "__dict__", {}).values())
    return found


def nbytes(tensors):
    """The bytes of plain tensors, each storage once; a subclass is counted by its parts."""
    plain = [tensor for tensor in tensors if not hasattr(tensor, "qdata")]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in plain}
    return sum(storages.values())


def test_greedy_is_generate(case, bare_generator):
    model, untouched = case
    generator = bare_generator(model, page_size=4)
    for length, ratio in PROMPTS:
        inputs = random_inputs(model, length=length, ratio_id=ratio, seed=length)
        expected = untouched.generate(**inputs, do_sample=False, max_new_tokens=20)
        got = generator.generate(**inputs, search="greedy", max_new_tokens=20)
        assert greedy_differences(untouched, inputs, got, expected, NEAR_TIE[model.dtype]) == 0, (length, ratio)
    assert generator.engine.view.dtype == model.dtype


def test_token_beams_are_generate(case, bare_generator):
    model, untouched = case
    if model.dtype != torch.float32:
        pytest.skip("sums of log-probs in bfloat16 tie too often")
    generator = bare_generator(model, page_size=4)
    for length, ratio in PROMPTS:
        inputs = random_inputs(model, length=length, ratio_id=ratio, seed=length)
        expected = untouched.generate(**inputs, do_sample=False, num_beams=3, max_new_tokens=10)
        assert torch.equal(generator.generate(**inputs, search="token_beam", num_beams=3, max_new_tokens=10), expected)


@pytest.mark.parametrize(("name", "dtype"), CASES)
@torch._inductor.config.patch(compile_threads=1)
def test_compiled_steps_draw_the_same_tokens(name, dtype, tmp_path, bare_generator, is_full):
    """The int8 weights are large enough for the kernel that reads them as they are."""
    if not is_full and (name, dtype) != CASES[0]:
        pytest.skip("one kind of quantised weights is compiled, and the others with --full")
    large = SHAPE | dict(hidden=512, ffn=512) if name == "int8" else SHAPE
    build_random_mllama(**large, seed=0, std=0.15).save_pretrained(tmp_path)
    model = load(tmp_path, name, dtype)
    inputs = random_inputs(model, length=17, ratio_id=6, seed=17)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain, compiled = (
        bare_generator(model, page_size=4, compile=compile).generate(**inputs, search="greedy", max_new_tokens=20)
        for compile in (False, True)
    )
    assert torch.equal(plain, compiled)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 3
    assert not torch._dynamo.utils.counters["graph_break"]


def test_forks_have_the_log_probs_of_the_model(case, bare_generator):
    """Eight candidates in one pass, against one forward pass of the model over each whole continuation."""
    model, untouched = case
    inputs = random_inputs(model, length=21, ratio_id=6, seed=3)
    session = bare_generator(model, page_size=4).engine.open(split_rows(inputs, model.config)[0])

    def program():
        (first,) = yield [Expand(session.root, (1, 2), SamplingParams(), 5, frozenset())]
        pools = yield [Expand(each.id, (3, 4, 5, 6), SamplingParams(), 8, frozenset()) for each in first]
        return [(one, [*pool]) for one, pool in zip(first, pools)]

    drive = Drive(session, program())
    while not drive.done:
        session._engine.step()
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 0.25}[model.dtype]
    for first, pool in drive.result:
        for branch in pool:
            tokens = torch.tensor([[*first.tokens, *branch.tokens]])
            ids = torch.cat([inputs["input_ids"], tokens], dim=1)
            mask = inputs["cross_attention_mask"]
            mask = torch.cat([mask, mask[:, -1:].expand(-1, tokens.shape[1], -1, -1)], dim=1)
            full = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids), "cross_attention_mask": mask}
            with torch.inference_mode():
                scores = untouched(**full).logits[0, 20:-1].float().log_softmax(-1)
            expected = scores.gather(1, tokens.T)[:, 0]
            got = torch.tensor([*first.logprobs, *branch.logprobs])
            assert (got - expected).abs().max() < tolerance


def test_the_copy_shares_every_tensor(case):
    model, _ = case
    before = tensors_in(model)
    copied = copy_around_tensors(model)
    assert all(ours is theirs for ours, theirs in zip(copied.parameters(), model.parameters(), strict=True))
    assert not [tensor for key, tensor in tensors_in(copied).items() if key not in before]
    modules = {id(module) for module in model.modules()}
    assert not [name for name, module in copied.named_modules() if id(module) in modules]


def test_a_quantised_model_is_followed(case, bare_generator):
    model, _ = case
    model, inputs = copy.deepcopy(model), random_inputs(model, length=9, ratio_id=6, seed=3)
    generator = bare_generator(model)
    state, pages = state_of(model), generator.engine.view.kv_cache
    first = generator.generate(**inputs, search="greedy", max_new_tokens=8)
    model.generate(**inputs, do_sample=False, max_new_tokens=4)
    assert state_of(model) == state
    assert torch.equal(generator.generate(**inputs, search="greedy", max_new_tokens=8), first)
    assert generator.engine.view.kv_cache is pages
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight.flip(0))  # written in place
    second = generator.generate(**inputs, search="greedy", max_new_tokens=8)
    assert torch.equal(second, bare_generator(model).generate(**inputs, search="greedy", max_new_tokens=8))
    assert not torch.equal(second, first)
    layers = model.model.language_model.layers
    layers[0].self_attn.q_proj.weight = layers[2].self_attn.q_proj.weight  # replaced
    third = generator.generate(**inputs, search="greedy", max_new_tokens=8)
    assert generator.engine.view.kv_cache is not pages
    assert torch.equal(third, bare_generator(model).generate(**inputs, search="greedy", max_new_tokens=8))


def test_the_caller_keeps_the_model(case, bare_generator):
    model, untouched = case
    inputs = random_inputs(model, length=12, ratio_id=1, seed=7)
    bare_generator(model).generate(**inputs, search="sample", max_new_tokens=8, seed=1)
    expected = untouched.generate(**inputs, do_sample=False, max_new_tokens=12)
    assert torch.equal(model.generate(**inputs, do_sample=False, max_new_tokens=12), expected)


def test_8_bits_of_bitsandbytes_are_refused(folder, bare_generator):
    settings = {"quantization_config": BitsAndBytesConfig(load_in_8bit=True), "device_map": {"": "cpu"}}
    model = AutoModelForImageTextToText.from_pretrained(folder, **settings)
    with pytest.raises(ValueError, match=r"model must not be in bitsandbytes' 8 bits: use quantize='int8'"):
        bare_generator(model)


def test_a_config_of_the_caller(folder, bare_generator, monkeypatch, tiny):
    """transformers' own argument, with a device."""
    from llava_cot import generator as module

    monkeypatch.setattr(module.AutoProcessor, "from_pretrained", lambda name, **given: tiny.processor)
    skipped = ["model.vision_model", "model.multi_modal_projector", "lm_head"]
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=skipped)
    generator = SwiresGenerator.from_pretrained(folder, quantization_config=config, device="cpu")
    assert type(decoder_matrices(generator.model)[f"{LAYERS[0]}0.self_attn.q_proj"]).__name__ == "Linear4bit"
    inputs = random_inputs(generator.model, length=12, ratio_id=1, seed=7)
    expected = generator.model.generate(**inputs, do_sample=False, max_new_tokens=8)
    assert torch.equal(generator.generate(**inputs, search="greedy", max_new_tokens=8), expected)


@pytest.mark.parametrize("name", ["int8", "nf4"])
def test_a_model_that_was_saved_quantised(folder, tmp_path, name, monkeypatch, tiny):
    from llava_cot import generator as module

    monkeypatch.setattr(module.AutoProcessor, "from_pretrained", lambda name, **given: tiny.processor)
    model = load(folder, name, torch.float32)
    model.save_pretrained(tmp_path)
    generator = SwiresGenerator.from_pretrained(tmp_path)
    inputs = random_inputs(model, length=12, ratio_id=1, seed=7)
    expected = model.generate(**inputs, do_sample=False, max_new_tokens=8)
    assert torch.equal(generator.generate(**inputs, search="greedy", max_new_tokens=8), expected)
    with pytest.raises(ValueError, match=f"for a model that is quantised already, got '{name}'"):
        SwiresGenerator.from_pretrained(tmp_path, quantize=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families(family, tmp_path, bare_generator):
    """Nothing but matrices of decoder layers is quantised, and all of them are."""
    build, make_inputs = FAMILIES[family]
    sizes = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}
    build(**sizes).save_pretrained(tmp_path)
    for name, dtype in (("int8", torch.float32), ("int4", torch.bfloat16), ("nf4", torch.float32)):
        model = load(tmp_path, name, dtype)
        plain = {key for key, parameter in model.named_parameters() if type(parameter) is nn.Parameter}
        quantised = {key for key, _ in model.named_parameters()} - plain
        assert quantised == {f"{key}.weight" for key in decoder_matrices(model)} and quantised
        inputs = make_inputs(model, length=30, seed=1)
        inputs = {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}
        got = bare_generator(model).generate(**inputs, search="greedy", max_new_tokens=12)
        if dtype == torch.float32:
            assert torch.equal(got, model.generate(**inputs, do_sample=False, max_new_tokens=12))


@pytest.mark.parametrize("name", ["int8", "int4", "nf4"])
def test_the_tiny_model(name):
    sample = shapes.sample(806_000)
    generator = SwiresGenerator.from_pretrained("tiny", quantize=name)
    assert generator.model.dtype == (torch.bfloat16 if name == "int4" else torch.float32)
    answer = generator.answer(sample.image, sample.question, "greedy", max_new_tokens=160)
    assert answer.violation is None


def test_threads_are_those_of_the_model_in_full(tmp_path):
    """bitsandbytes packs two elements to a byte."""
    model = build_random_mllama(**{**SHAPE, "hidden": 256}, ffn=4096, seed=0)
    model.save_pretrained(tmp_path)
    assert threads_for(load(tmp_path, "nf4", torch.float32), torch.device("cpu")) is None
    assert threads_for(model, torch.device("cpu")) is None


@pytest.mark.parametrize("name", [name for name, way in QUANTIZATIONS.items() if way.runs_on_cpu])
def test_the_plan_is_what_is_allocated(name, tmp_path, bare_generator):
    """Sizes that int4 does not pad on a GPU either."""
    model = build_random_mllama(hidden=1024, layers=2, heads=8, kv_heads=2, cross=[1], ffn=1024, vocab=97, seed=0)
    model.save_pretrained(tmp_path)
    prompt_tokens, new_tokens, candidates = 21, 9, 5
    plan = memory_plan(
        model.config,
        quantize=name,
        dtype=torch.bfloat16,
        candidates=candidates,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        page_size=4,
    )
    model = load(tmp_path, name, torch.bfloat16)
    assert nbytes(tensors_in([*model.parameters(), *model.buffers()]).values()) == plan.weights
    engine = bare_generator(model, page_size=4, num_pages=plan.num_pages).engine
    assert engine.view.kv_cache.nbytes == plan.parts["pages"]
    inputs = random_inputs(model, length=prompt_tokens, ratio_id=6, seed=3)  # of as many tiles as there can be
    model.generation_config.eos_token_id = None
    session = engine.open(split_rows(inputs, model.config)[0])

    def program():
        at_random = SamplingParams(temperature=100.0)  # candidates with equal tokens would share their pages
        yield [Expand(session.root, tuple(range(candidates)), at_random, new_tokens + 1, frozenset())]

    drive, stored = Drive(session, program()), 0
    while not drive.done:
        engine.step()
        stored = max(stored, *engine.view.images._segments.values(), 0)  # the ends of what is in use
    assert drive.error is None and engine.runner.peak_pages == plan.num_pages
    assert plan.parts["image"] == engine.view.images.kv[:, :, :stored].nbytes > 0
