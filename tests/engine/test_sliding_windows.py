"""Layers that attend to a window, and the images of Gemma 3, beside transformers' own masks and tokens."""

import inspect

import pytest
import torch
from helpers.random_llava import FAMILIES, IMAGE_TOKEN, build_random_gemma3, build_random_llava
from torch.nn.functional import scaled_dot_product_attention
from transformers import Gemma3ForConditionalGeneration

from llava_cot.check.random_models import EOS, PAD, build_config, make_inputs, randomize
from llava_cot.engine import attention
from llava_cot.families import family_of
from llava_cot.prompt import split_rows


def gemma3_of_16_tokens(window):
    """A Gemma 3 whose images have 16 tokens."""
    torch.manual_seed(1)
    config = build_config("gemma3", sliding_window=window)
    config.mm_tokens_per_image = 16
    model = Gemma3ForConditionalGeneration(config)
    randomize(model)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = EOS, PAD
    return model.eval()


def ids_and_kinds(ids):
    """Token ids, and which of them are of images: ``token_type_ids``."""
    ids = torch.tensor(ids)
    return ids, (ids == IMAGE_TOKEN).int()


@pytest.mark.parametrize("window", [0, 1, 3, 5, 100])
def test_the_mask_of_gemma3_is_transformers_own(window):
    """Two images, one right after the other's text, one at the end; the second prompt has one image."""
    model = build_random_gemma3(sliding_window=window or 1)
    image = [IMAGE_TOKEN] * 4
    ids, kinds = ids_and_kinds([[5, *image, 6, 7, *image], [*image, 5, 6, 7, 8, 9, 10, 11]])
    create = Gemma3ForConditionalGeneration.create_masks_for_generate
    cache = "cache" if "cache" in inspect.signature(create).parameters else "past_key_values"
    model.config.text_config._attn_implementation = "sdpa"
    embeds = torch.zeros(*ids.shape, model.config.text_config.hidden_size)
    expected = create(
        model.config, embeds, torch.ones_like(ids), position_ids=None, token_type_ids=kinds, **{cache: None}
    )["sliding_attention" if window else "full_attention"]
    found = family_of(model.config).prefill_mask({"input_ids": ids, "pixel_values": torch.zeros(3, 3, 1, 1)}, window)
    assert torch.equal(found, expected)
    assert family_of(model.config).prefill_mask({"input_ids": ids}, window) is None


@pytest.mark.parametrize("window", [3, 20])
def test_an_image_that_is_wider_than_the_window(bare_generator, window):
    """Images of 16 tokens: none, one after some text, and two with one token between them."""
    model, untouched = (gemma3_of_16_tokens(window) for _ in range(2))
    generator = bare_generator(model, page_size=4)
    images = {0: [], 1: [*range(3, 7), *[IMAGE_TOKEN] * 16], 2: [3, *[IMAGE_TOKEN] * 16, 8, *[IMAGE_TOKEN] * 16]}
    for count, start in images.items():
        ids, kinds = ids_and_kinds([[*start, *range(30, 52)]])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if count:
            pixels = torch.randn(count, 3, 28, 28, generator=torch.Generator().manual_seed(count))
            inputs |= {"pixel_values": pixels, "token_type_ids": kinds}
        expected = untouched.generate(**inputs, do_sample=False, max_new_tokens=20)
        assert torch.equal(generator.generate(**inputs, search="greedy", max_new_tokens=20), expected)
    # Of the last, with two images:
    with pytest.raises(ValueError, match=r"token_type_ids must be 1 at image tokens and 0 elsewhere, got \[\[0, 0"):
        split_rows({**inputs, "token_type_ids": 0 * kinds}, untouched.config)
    with pytest.raises(ValueError, match=r"input_ids\[0\] must have its images' tokens=32, got 31 image tokens"):
        split_rows({"input_ids": ids[:, 2:], "pixel_values": pixels}, untouched.config)


def test_what_the_kernels_lack_is_refused(bare_generator):
    model = build_random_gemma3()
    model.config.text_config.use_bidirectional_attention = True
    with pytest.raises(ValueError, match="model must attend to earlier tokens alone, got gemma3_text with"):
        bare_generator(model)
    model = build_random_llava(model_type="gemma2", head_dim=8, query_pre_attn_scalar=8, attn_logit_softcapping=5.0)
    generator = bare_generator(model)
    with pytest.raises(
        ValueError, match="model must have attention without softcap, which the kernels lack, got Gemma2"
    ):
        generator.generate(**make_inputs(model, length=20, seed=1), search="greedy")
    assert generator.engine.pages_in_use == 0


WINDOWED = {
    "mistral": dict(model_type="mistral", sliding_window=9, head_dim=8),
    "mistral without a window": dict(model_type="mistral", sliding_window=None, head_dim=8),
    "cohere2": dict(model_type="cohere2", sliding_window=5, sliding_window_pattern=2, pad_token_id=0),
}


@pytest.mark.parametrize("settings", WINDOWED.values(), ids=WINDOWED)
def test_text_models_with_windows(bare_generator, settings):
    model, untouched = (build_random_llava(seed=5, **settings) for _ in range(2))
    generator = bare_generator(model, page_size=4)
    for length, images in ((10, 1), (41, 2)):
        inputs = make_inputs(model, length=length, images=images, seed=length)
        expected = untouched.generate(**inputs, do_sample=False, max_new_tokens=20)
        assert torch.equal(generator.generate(**inputs, search="greedy", max_new_tokens=20), expected)


def test_decoding_reads_nothing_in_front_of_the_window(bare_generator):
    """Before every step the pages get NaN wherever a window of 9 has passed."""
    model, untouched = (build_random_llava(seed=5, **WINDOWED["mistral"]) for _ in range(2))
    generator = bare_generator(model, page_size=4)
    view, passed = generator.engine.view, []
    decode = view.decode

    def decoding(token_ids, positions, batch, **kwargs):
        (length,), (pages,) = batch.seq_lens.tolist(), batch.page_table.long()
        index = torch.arange(length - 9)
        view.kv_cache[:, :, pages[index // 4], index % 4] = torch.nan
        passed.append(len(index))
        return decode(token_ids, positions, batch, **kwargs)

    view.decode = decoding
    inputs = make_inputs(model, length=30, seed=1)
    expected = untouched.generate(**inputs, do_sample=False, max_new_tokens=12)
    assert torch.equal(generator.generate(**inputs, search="greedy", max_new_tokens=12), expected)
    assert passed == list(range(22, 33))


@pytest.mark.parametrize("name", ["windowed", "gemma3"])
def test_flash_attn_is_told_the_window(bare_generator, monkeypatch, name):
    """A stand-in with the arguments and the meaning of flash-attn's, which runs on a GPU only."""
    windows = []

    def flash_attn_func(query, key, value, *, softmax_scale, causal, window_size):
        windows.append(window_size)
        rows, (before, behind) = torch.arange(query.shape[1]), window_size
        distance = rows[:, None] - rows
        seen = (distance >= 0) if before < 0 else (distance >= -behind) & (distance <= before)
        packed = (x.transpose(1, 2) for x in (query, key, value))
        out = scaled_dot_product_attention(*packed, attn_mask=seen, scale=softmax_scale, enable_gqa=True)
        return out.transpose(1, 2)

    build, make_inputs = FAMILIES[name]
    model, untouched = build(seed=3), build(seed=3)
    generator = bare_generator(model, page_size=4)
    monkeypatch.setattr(attention, "flash_attn_func", flash_attn_func)
    monkeypatch.setattr(attention, "_flash_attn_takes", lambda query: True)
    with_image = make_inputs(model, length=40, seed=2)
    ids = with_image["input_ids"].clamp(max=90)
    for inputs in (with_image, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}):
        expected = untouched.generate(**inputs, do_sample=False, max_new_tokens=10)
        assert torch.equal(generator.generate(**inputs, search="greedy", max_new_tokens=10), expected)
    if name == "windowed":
        assert windows == [(-1, -1), (9, 0), (9, 0)] * 2
    else:  # that attends to images with a mask, which flash-attn does not take
        assert windows == [(6, 0), (6, 0), (-1, -1)]
