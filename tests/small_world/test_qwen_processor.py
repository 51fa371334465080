"""The second bundled model's processor and its start: the words of the first one, and an image token for each cell."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoProcessor

from llava_cot.data import shapes
from llava_cot.prompt import build_inputs
from llava_cot.stages import render
from llava_cot.tiny import tiny_path
from llava_cot.tiny_qwen import tiny_qwen_path
from tools.small_world.untrained_qwen import CHAT_TEMPLATE, SPECIAL_TOKENS, build_config, build_model, build_processor


@pytest.fixture(scope="module")
def processor():
    return build_processor()


def test_its_words_are_those_of_the_first_model(processor):
    first = AutoProcessor.from_pretrained(tiny_path())
    text = f"{render(shapes.sample(0).stages)} Ünïcode 象 \r\n\t1234567"
    ids = processor.tokenizer(text).input_ids
    assert ids == first.tokenizer(text, add_special_tokens=False).input_ids
    assert processor.tokenizer.decode(ids) == text
    words = len(processor.tokenizer) - len(SPECIAL_TOKENS)
    assert processor.tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == [*range(words, words + 7)]


def test_an_image_token_is_a_cell(processor):
    sample = shapes.sample(0)
    inputs = build_inputs(processor, sample.image, sample.question, "one")
    ids = inputs["input_ids"][0]
    is_image = ids == processor.image_token_id
    assert is_image.sum() == len(shapes.CELLS) and torch.equal(inputs["mm_token_type_ids"][0].bool(), is_image)
    text = processor.tokenizer.decode(ids[~is_image])
    assert text == (
        f"<|im_start|>user\n<|vision_start|><|vision_end|>{sample.question}<|im_end|>\n<|im_start|>assistant\n"
    )
    cell = inputs["pixel_values"].view(9, -1, 3, 2, 8, 8)[4, 3, :, 0]  # of the middle, the last patch
    pixels = torch.tensor(list(sample.image.crop((24, 24, 32, 32)).getdata())).view(8, 8, 3).permute(2, 0, 1)
    torch.testing.assert_close(cell, pixels / 127.5 - 1, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(48, 48), (20, 300), (1000, 700)])
def test_images_of_any_size_take_few_tokens(processor, size):
    image = shapes.sample(0).image.resize(size)
    inputs = build_inputs(processor, image, "Count.", "one")
    tokens = int((inputs["input_ids"] == processor.image_token_id).sum())
    assert 1 <= tokens <= 12 and int(inputs["image_grid_thw"].prod()) == 4 * tokens


def test_saved_and_loaded(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    bundled, loaded = (AutoProcessor.from_pretrained(folder) for folder in (tiny_qwen_path(), tmp_path))
    sample = shapes.sample(1)
    before, *others = (
        build_inputs(each, sample.image, sample.question, "one") for each in (processor, bundled, loaded)
    )
    for each, made in zip((bundled, loaded), others):
        assert each.chat_template == CHAT_TEMPLATE
        assert each.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
        assert before.keys() == made.keys() and all(torch.equal(before[name], made[name]) for name in before)


def test_the_text_layers_begin_as_those_of_the_first_model(processor):
    config, mllama = build_config(processor), load_file(tiny_path() / "model.safetensors")
    model = build_model(processor, 0, language_model=tiny_path())
    bare = build_model(processor, 0)
    assert sum(parameter.numel() for parameter in model.parameters()) < 2e6
    ours, random = (dict(each.model.language_model.named_parameters()) for each in (model, bare))
    copied = {name for name in ours if not torch.equal(ours[name], random[name])}
    cross = {name for name in ours if name.startswith(("layers.1.self_attn", "layers.4.self_attn"))}
    biases = {name for name in ours if name.endswith("bias")}
    assert copied | cross | biases == set(ours) and not copied & (cross | biases)
    for name in ("layers.3.self_attn.q_proj.weight", "layers.1.mlp.up_proj.weight", "norm.weight"):
        assert torch.equal(ours[name], mllama[f"language_model.model.{name}"])
    gate = mllama["language_model.model.layers.4.cross_attn_mlp_gate"].tanh()
    down = mllama["language_model.model.layers.4.mlp.down_proj.weight"]
    assert torch.equal(ours["layers.4.mlp.down_proj.weight"], down * gate)
    words = config.text_config.vocab_size - len(SPECIAL_TOKENS)
    assert torch.equal(model.lm_head.weight[:words], mllama["language_model.lm_head.weight"][:words])
    assert torch.equal(model.lm_head.weight[words:], bare.lm_head.weight[words:])
