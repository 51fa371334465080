"""Prompts that are computed together leave what each leaves alone."""

import copy
import logging

import pytest
import torch
from helpers.jobs import Job, run, steps
from helpers.random_llava import FAMILIES
from helpers.random_mllama import TINY_SHAPE, build_random_mllama, random_inputs

from llava_cot.core import Expand, SamplingParams
from llava_cot.engine import model as model_module
from llava_cot.engine import runner
from llava_cot.engine.branch import Branch
from llava_cot.engine.config import EngineConfig
from llava_cot.engine.engine import Engine
from llava_cot.engine.runner import ModelRunner
from llava_cot.engine.schedule import PROMPTS_PER_PREFILL
from llava_cot.families import Family
from llava_cot.prompt import split_rows
from llava_cot_kernels import OutOfPages
from llava_cot_kernels.stage_tags import StageTags

LENGTHS = (7, 1, 16, 31, 4)  # tokens; of one page size, prime, less than a page
RATIOS = (1, 6, 1, 2, 6)  # 1, 4 and 2 tiles
TAGS = StageTags([b"a", b"</x>"], ["</x>"])
GREEDY = SamplingParams(temperature=0.0)


def prefilled(model, prompts, *, together):
    """[(root, its keys and values by token [2, layers, T, heads, dim], its image's [2, layers, S, heads, dim])]"""
    runner = ModelRunner(model, EngineConfig(page_size=4, num_pages=200))
    roots = [Branch(None, -1, prompt["input_ids"].shape[1]) for prompt in prompts]
    cache = runner.view.kv_cache.fill_(torch.nan)
    runner.view.images.kv[:, :, :500] = torch.nan
    if together:
        runner.prefill(roots, prompts)
    else:
        for root, prompt in zip(roots, prompts):
            runner.prefill([root], [prompt])
    table = runner.pool.page_table([root.seq for root in roots]).long()
    found = []
    for root, pages, prompt in zip(roots, table, prompts):
        image = runner.view.images.kv[:, :, root.image : root.image + runner.view.image_tokens(prompt)]
        found.append((root, cache[:, :, pages].flatten(2, 3)[:, :, : root.length].clone(), image.clone()))
    return found


@pytest.fixture
def exact():
    """In float64 what differs is not rounding."""
    return build_random_mllama(**TINY_SHAPE, seed=0)


def test_several_prompts_at_once(exact):
    prompts = [
        split_rows(random_inputs(exact, length=length, ratio_id=ratio, seed=seed), exact.config)[0]
        for seed, (length, ratio) in enumerate(zip(LENGTHS, RATIOS))
    ]
    untouched, alone = copy.deepcopy(exact), prefilled(exact, prompts, together=False)
    for (root, kv, image), (single, single_kv, single_image), prompt in zip(
        prefilled(exact, prompts, together=True), alone, prompts, strict=True
    ):
        with torch.inference_mode():
            truth = copy.deepcopy(untouched).double()(**{**prompt, "pixel_values": prompt["pixel_values"].double()})
        assert (root.next_logits - truth.logits[0, -1]).abs().max() < 1e-4
        torch.testing.assert_close(root.next_logits, single.next_logits, atol=1e-4, rtol=0)
        torch.testing.assert_close(kv, single_kv, atol=1e-4, rtol=1e-4)  # and NaN nowhere
        torch.testing.assert_close(image, single_image, atol=1e-4, rtol=1e-4)
        assert image.shape[2] == single_image.shape[2] > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_images_in_the_prompt(family):
    build, make_inputs = FAMILIES[family]
    model, untouched = build(seed=3), build(seed=3)
    inputs = [make_inputs(model, length=length, seed=seed) for seed, length in enumerate((21, 34, 25))]
    prompts = [split_rows(each, model.config)[0] for each in inputs]
    alone = prefilled(model, prompts, together=False)
    for (root, kv, _), (single, single_kv, _), each in zip(prefilled(model, prompts, together=True), alone, inputs):
        with torch.inference_mode():
            truth = untouched(**each).logits[0, -1]
        torch.testing.assert_close(root.next_logits, truth, atol=1e-4, rtol=0)
        torch.testing.assert_close(kv, single_kv, atol=1e-4, rtol=1e-4)
        assert root.position_offset == single.position_offset and root.image == -1


def growing(root):
    ((branch,),) = yield [Expand(root.id, (1,), GREEDY, 6, frozenset())]
    return branch.tokens


def test_one_pass_for_many(exact, monkeypatch):
    """Of an engine's questions, those whose images have one shape; two images are another shape than one."""
    engine, passes = Engine(exact, TAGS, config=EngineConfig(page_size=4, num_pages=400)), []
    prefill = engine.view.prefill
    monkeypatch.setattr(
        engine.view, "prefill", lambda prompts, *args: passes.append(len(prompts)) or prefill(prompts, *args)
    )
    inputs = [random_inputs(exact, length=9 + seed, ratio_id=6, seed=seed) for seed in range(PROMPTS_PER_PREFILL + 2)]
    for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"):
        inputs[1][name] = inputs[1][name].repeat_interleave(2, dim=1)
    inputs[1]["cross_attention_mask"] = inputs[1]["cross_attention_mask"].repeat_interleave(2, dim=2)
    jobs = [Job(split_rows(each, exact.config)[0], growing) for each in inputs]
    run(engine, jobs)
    assert passes == [PROMPTS_PER_PREFILL - 1, 1, 2]
    for job, each in zip(jobs, inputs):
        expected = build_random_mllama(**TINY_SHAPE, seed=0).generate(**each, do_sample=False, max_new_tokens=6)
        assert job.error is None and job.result == expected[0, each["input_ids"].shape[1] :].tolist()
        assert (job.usage.image_encodings, job.usage.prompt_tokens) == (1, job.prompt_length)


def test_no_pass_is_too_large(exact, monkeypatch):
    """Two images of four tiles are as much as may be at once."""
    inputs = [random_inputs(exact, length=9, ratio_id=6, seed=seed) for seed in range(5)]
    monkeypatch.setitem(Family.pixel_values_per_pass, "cpu", 2 * inputs[0]["pixel_values"].numel())
    engine, passes = Engine(exact, TAGS, config=EngineConfig(page_size=4, num_pages=400)), []
    prefill = engine.view.prefill
    monkeypatch.setattr(
        engine.view, "prefill", lambda prompts, *args: passes.append(len(prompts)) or prefill(prompts, *args)
    )
    run(engine, [Job(split_rows(each, exact.config)[0], growing) for each in inputs])
    assert passes == [2, 2, 1]
    monkeypatch.setitem(Family.pixel_values_per_pass, "cpu", 1)
    run(engine, [Job(split_rows(each, exact.config)[0], growing) for each in inputs[:2]])
    assert passes == [2, 2, 1, 1, 1]
    monkeypatch.setitem(Family.pixel_values_per_pass, "cpu", 1 << 30)
    monkeypatch.setattr(runner, "TOKENS_PER_PASS", 3 * 9)
    run(engine, [Job(split_rows(each, exact.config)[0], growing) for each in inputs])
    assert passes[5:] == [3, 2]


def test_a_large_memory_is_not_filled_with_room_for_images(random_model, monkeypatch):
    """Engines of small models share a GPU with others: a fifth of its memory each would be all of it soon."""
    monkeypatch.setattr(model_module, "CPU_BYTES", 1 << 40)
    view = model_module.ModelView(random_model, EngineConfig(page_size=4, num_pages=10))
    assert view.images.capacity == model_module.MAX_IMAGE_TOKENS


def test_images_wait_for_room(exact, monkeypatch, caplog):
    """A store of six tiles takes one question's four tiles at a time, and never eight."""
    tokens = (exact.config.vision_config.image_size // exact.config.vision_config.patch_size) ** 2 + 1
    text = exact.config.text_config
    of_token = 2 * 2 * text.hidden_size // text.num_attention_heads * text.num_key_value_heads * 4  # 2 cross layers
    monkeypatch.setattr(model_module, "CPU_BYTES", 6 * tokens * of_token)
    with caplog.at_level(logging.INFO, logger="llava_cot"):
        engine = Engine(exact, TAGS, config=EngineConfig(page_size=4, num_pages=400))
    assert f"1600 tokens in 400 pages (0.00 GiB) and for {6 * tokens} image tokens" in caplog.text
    inputs = [random_inputs(exact, length=9, ratio_id=ratio, seed=ratio) for ratio in (6, 6, 1, 6, 2, 1)]
    jobs, most = [Job(split_rows(each, exact.config)[0], growing) for each in inputs], 0
    for _ in steps(engine, jobs):
        most = max(most, engine.images_in_use)
    assert [job.error for job in jobs] == [None] * len(jobs) and most in (2, 3)
    large = random_inputs(exact, length=9, ratio_id=6, seed=0)
    for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"):
        large[name] = large[name].repeat_interleave(2, dim=1)
    large["cross_attention_mask"] = large["cross_attention_mask"].repeat_interleave(2, dim=2)
    jobs = [Job(split_rows(each, exact.config)[0], growing) for each in (inputs[0], large, inputs[1])]
    run(engine, jobs)
    assert isinstance(jobs[1].error, OutOfPages) and jobs[0].error is jobs[2].error is None
    assert f"store of {6 * tokens} image tokens is too small" in str(jobs[1].error)
    assert f"it has {8 * tokens}" in str(jobs[1].error)
    assert (engine.pages_in_use, engine.images_in_use) == (0, 0)
