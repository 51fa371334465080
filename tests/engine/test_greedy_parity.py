"""Greedy search equals ``model.generate(do_sample=False)``, from a model that this package never touched."""

import copy
import itertools

import pytest
import torch
from helpers.parity import greedy_differences, record_logits
from helpers.random_mllama import build_random_mllama, random_inputs

from llava_cot import SwiresGenerator
from llava_cot.data import shapes
from llava_cot.prompt import build_inputs

SHAPES = {
    "gqa1": dict(hidden=32, layers=4, heads=4, kv_heads=4, cross=[1, 3], vocab=97),
    "gqa2": dict(hidden=48, layers=5, heads=6, kv_heads=3, cross=[2], vocab=131),
    "gqa4": dict(hidden=64, layers=6, heads=8, kv_heads=2, cross=[1, 2, 5], vocab=64),
}
LENGTHS = (1, 2, 5, 15, 16, 17, 64, 131, 300)
ONE_TILE, FOUR_TILES = 1, 6  # aspect ratio ids: 1 x 1 and 2 x 2


def test_fifty_fresh_images(tiny, fresh_tiny):
    samples = [shapes.sample(seed) for seed in range(800_000, 800_050)]
    rows = [build_inputs(tiny.processor, s.image, s.question, "one") for s in samples]
    assert _batch_differences(fresh_tiny, rows, _greedy(fresh_tiny, rows, 160), tiny, 160) == [0] * 50


@pytest.mark.parametrize("shape", SHAPES)
def test_random_models(bare_generator, shape):
    """Every length with one tile and with four is a row of one batch, which every page size computes."""
    model = build_random_mllama(**SHAPES[shape], seed=3)
    untouched = build_random_mllama(**SHAPES[shape], seed=3)
    cases = list(itertools.product(LENGTHS, (ONE_TILE, FOUR_TILES)))
    rows = [random_inputs(model, length=length, ratio_id=ratio, seed=length) for length, ratio in cases]
    expected = _greedy(untouched, rows, 24)
    for page_size in (1, 4, 16):
        generator = bare_generator(model, page_size=page_size)
        differences = _batch_differences(untouched, rows, expected, generator, 24)
        assert dict(zip(cases, differences)) == dict.fromkeys(cases, 0), page_size
        assert generator.engine.pages_in_use == generator.engine.images_in_use == 0


@pytest.mark.parametrize("ratio", [ONE_TILE, FOUR_TILES])
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_are_as_good_as_sdpa(bare_generator, shape, ratio):
    """Per step: at most twice the error that transformers' own SDPA makes against float64, plus 1e-5."""
    model = build_random_mllama(**SHAPES[shape], seed=5)
    untouched = build_random_mllama(**SHAPES[shape], seed=5)
    exact = copy.deepcopy(untouched).double()
    generator = bare_generator(model, page_size=4)
    for length in (1, 16, 300):
        inputs = random_inputs(model, length=length, ratio_id=ratio, seed=length)
        with record_logits(generator.engine) as logits:
            ids = generator.generate(**inputs, search="greedy", max_new_tokens=12)
        mask = inputs["cross_attention_mask"]
        full = {**inputs, "input_ids": ids[:, :-1], "attention_mask": torch.ones_like(ids[:, :-1])}
        more = ids.shape[1] - 1 - length
        full["cross_attention_mask"] = torch.cat([mask, mask[:, -1:].expand(-1, more, -1, -1)], dim=1)
        with torch.inference_mode():
            plain = untouched(**full).logits[0, length - 1 :]
            truth = exact(**{**full, "pixel_values": full["pixel_values"].double()}).logits[0, length - 1 :]
        got = torch.stack(logits)
        assert got.shape == truth.shape
        assert (got - truth).abs().max() <= 2 * (plain - truth).abs().max() + 1e-5


def test_batches_give_what_their_rows_give_alone(tiny):
    tiny.processor.tokenizer.padding_side = "left"
    samples = [shapes.sample(seed) for seed in range(800_100, 800_105)]
    rows = [build_inputs(tiny.processor, s.image, s.question, "one") for s in samples]
    batch = _left_padded(rows, pad=tiny.model.generation_config.pad_token_id)
    together = tiny.generate(**batch, search="greedy", max_new_tokens=160)
    start = batch["input_ids"].shape[1]
    for row, inputs in enumerate(rows):
        alone = tiny.generate(**inputs, search="greedy", max_new_tokens=160)[0, inputs["input_ids"].shape[1] :]
        assert together[row, start : start + len(alone)].tolist() == alone.tolist()
        assert (together[row, start + len(alone) :] == tiny.model.generation_config.pad_token_id).all()


def test_the_model_sees(tiny):
    """Swapping the images of two questions changes the answers."""
    samples = [shapes.sample(seed) for seed in range(800_200, 800_220)]
    own, others = samples[::2], samples[1::2]
    answers = tiny.answer_batch(
        [s.image for s in own + others], [s.question for s in own] * 2, "greedy", max_new_tokens=160
    )
    captions = [answer.stages["CAPTION"].text for answer in answers]
    assert sum(a != b for a, b in zip(captions[:10], captions[10:], strict=True)) >= 9


def test_bfloat16_runs(bare_generator):
    model = build_random_mllama(**SHAPES["gqa2"], seed=7).bfloat16()
    generator: SwiresGenerator = bare_generator(model, page_size=4)
    inputs = random_inputs(model, length=20, ratio_id=ONE_TILE, seed=1)
    ids = generator.generate(**inputs, search="greedy", max_new_tokens=8)
    assert ids.shape[1] <= 28 and generator.engine.view.kv_cache.dtype == torch.bfloat16


def _greedy(model, rows, limit):
    """What transformers adds to each prompt, all of them as one batch: each row ends with its EOS or at the limit."""
    batch = _left_padded(rows, pad=model.generation_config.pad_token_id)
    ids = model.generate(**batch, do_sample=False, max_new_tokens=limit)[:, batch["input_ids"].shape[1] :]
    return [_unpadded(model, row) for row in ids]


def _batch_differences(model, rows, expected, generator, limit):
    """For each row whether what ``generator`` adds differs from ``expected``, but for near ties of ``model``'s."""
    batch = _left_padded(rows, pad=model.generation_config.pad_token_id)
    got = generator.generate(**batch, search="greedy", max_new_tokens=limit)[:, batch["input_ids"].shape[1] :]
    return [
        greedy_differences(
            model,
            inputs,
            torch.cat([inputs["input_ids"][0], _unpadded(model, row)]).unsqueeze(0),
            torch.cat([inputs["input_ids"][0], theirs]).unsqueeze(0),
        )
        for inputs, row, theirs in zip(rows, got, expected, strict=True)
    ]


def _unpadded(model, tokens):
    """``tokens`` up to the first EOS, behind which there must be padding alone."""
    ends = (tokens == model.generation_config.eos_token_id).nonzero()
    length = int(ends[0]) + 1 if len(ends) else len(tokens)
    assert (tokens[length:] == model.generation_config.pad_token_id).all()
    return tokens[:length]


def _left_padded(rows, pad):
    longest = max(row["input_ids"].shape[1] for row in rows)

    def left(tensor, value):
        filler = tensor.new_full((1, longest - tensor.shape[1], *tensor.shape[2:]), value)
        return torch.cat([filler, tensor], dim=1)

    batch = {
        name: torch.cat([row[name] for row in rows])
        for name in rows[0]
        if name not in ("input_ids", "attention_mask", "cross_attention_mask")
    }
    batch["input_ids"] = torch.cat([left(row["input_ids"], pad) for row in rows])
    batch["cross_attention_mask"] = torch.cat([left(row["cross_attention_mask"], 0) for row in rows])
    batch["attention_mask"] = torch.cat([left(torch.ones_like(row["input_ids"]), 0) for row in rows])
    return batch
