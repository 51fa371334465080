"""The tiny model's processor: its tags, BOS and image behave as those of the 11B model."""

import pytest
import torch
from transformers import AutoProcessor

from llava_cot.data import shapes
from llava_cot.prompt import build_inputs
from llava_cot.stages import STAGES
from tools.small_world.processor import CHAT_TEMPLATE, build_processor
from tools.small_world.untrained import build_config


@pytest.fixture(scope="module")
def processor():
    return build_processor()


def tokens_of(processor, text) -> list[str]:
    ids = processor.tokenizer(text, add_special_tokens=False).input_ids
    return [processor.tokenizer.decode([token]) for token in ids]


@pytest.mark.parametrize("tag", [tag for stage in STAGES for tag in (stage.open_tag, stage.close_tag)])
def test_a_tag_is_several_tokens(processor, tag):
    tokens = tokens_of(processor, tag)
    assert len(tokens) > 1 and "".join(tokens) == tag


def test_tags_take_in_their_neighbours(processor):
    tokens = tokens_of(processor, "red square. </CAPTION>\n\n<REASONING> There")
    assert tokens == [*tokens_of(processor, "red square."), " </", "CAPTION", ">\n\n", "<REASONING", ">", " There"]


def test_any_text_survives(processor):
    text = " Ünïcode 象 \r\n\t</SUMMARY\n> 1234567"
    assert processor.tokenizer.decode(processor.tokenizer(text, add_special_tokens=False).input_ids) == text


@pytest.mark.parametrize("bos, count", [("one", 1), ("released", 2)])
def test_bos(processor, bos, count):
    sample = shapes.sample(0)
    ids = build_inputs(processor, sample.image, sample.question, bos)["input_ids"][0].tolist()
    assert ids[:count] == [processor.tokenizer.bos_token_id] * count
    assert ids.count(processor.tokenizer.bos_token_id) == count


def test_special_ids(processor):
    tokenizer, config = processor.tokenizer, build_config(processor)
    assert processor.image_token_id == config.image_token_index == config.text_config.vocab_size == len(tokenizer) - 1
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert (config.text_config.eos_token_id, config.text_config.pad_token_id) == (
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    )


def test_an_image_is_one_tile(processor):
    sample = shapes.sample(0)
    inputs = build_inputs(processor, sample.image, sample.question, "one")
    assert inputs["pixel_values"].shape == (1, 1, 1, 3, 48, 48)
    length = inputs["input_ids"].shape[1]
    assert inputs["cross_attention_mask"].shape == (1, length, 1, 1)
    at = inputs["input_ids"][0].tolist().index(processor.image_token_id)
    assert inputs["cross_attention_mask"][0, :, 0, 0].tolist() == [0] * at + [1] * (length - at)


def test_saved_and_loaded(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert loaded.chat_template == CHAT_TEMPLATE
    sample = shapes.sample(1)
    before, after = (build_inputs(p, sample.image, sample.question, "one") for p in (processor, loaded))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_bundled_one_is_this_one(processor, tiny):
    bundled = tiny.processor
    assert bundled.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    assert bundled.tokenizer("How many?").input_ids == processor.tokenizer("How many?").input_ids  # with a BOS
    assert bundled.chat_template == CHAT_TEMPLATE
