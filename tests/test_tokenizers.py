"""Tokenizers of published models: the bytes of every token, tags in any spelling, streams, and all searches."""

from itertools import pairwise

import pytest
from helpers.random_llava import build_random_llava
from helpers.real_tokenizers import FILES, load, missing_package
from transformers import LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from llava_cot.check.random_models import IMAGE_TOKEN, make_inputs
from llava_cot.check.text import check_spellings, check_texts
from llava_cot.generator import SwiresGenerator
from llava_cot.grammars import GRAMMARS
from llava_cot.search import POLICIES
from llava_cot_kernels.stage_tags import StageTags


@pytest.fixture(scope="module", params=FILES)
def case(request, tmp_path_factory):
    if package := missing_package(request.param):
        pytest.skip(f"needs {package}, of the [tokenizers] extra")
    return request.param, *load(request.param, tmp_path_factory.mktemp(request.param))


def test_the_bytes_of_every_token(case):
    name, tokenizer, listed = case
    tags = StageTags.from_tokenizer(tokenizer, [])
    data, offsets = bytes(tags.token_bytes.tolist()), tags.token_offsets.tolist()
    found = [data[start:end] for start, end in pairwise(offsets)]
    special = {*tokenizer.all_special_ids, *(id for id, t in tokenizer.added_tokens_decoder.items() if t.special)}
    assert all(found[token] == b"" for token in special if token < len(found))
    if listed is not None:
        assert found[: len(listed)] == listed
        return
    anchor = tokenizer("x", add_special_tokens=False)["input_ids"]
    before = tokenizer.decode(anchor)
    compared = 0
    for token in set(tokenizer.get_vocab().values()) - special:
        text = tokenizer.decode([*anchor, token]).removeprefix(before)
        if "\ufffd" not in text:  # a token may be a part of a character
            assert found[token] == text.encode(), (name, token)
            compared += 1
    assert compared > 30_000


def test_tags_in_a_thousand_spellings(case):
    for name in ("llava-cot", "mulberry"):
        check_spellings(case[1], GRAMMARS[name], 500)


def test_tags_that_are_tokens_of_their_own(case):
    """Added tokens, special or not, that spell a tag or a part of one."""
    from copy import deepcopy

    tokenizer = deepcopy(case[1])
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<answer>", "</answer>"]})
    check_spellings(tokenizer, GRAMMARS["think-answer"], 200)
    check_texts(tokenizer, GRAMMARS["think-answer"], 100)


def test_streams_never_cut_a_character(case):
    check_texts(case[1], GRAMMARS["think-answer"], 1000)


@pytest.mark.filterwarnings("ignore:no calibration")
def test_all_searches(case):
    name, tokenizer, _ = case
    if name not in ("llama3", "mistral"):
        pytest.skip("one byte-level and one SentencePiece tokenizer are enough for the searches")
    model = build_random_llava(vocab=len(tokenizer), image_token=IMAGE_TOKEN)
    processor = LlavaProcessor(CLIPImageProcessorPil(), tokenizer, patch_size=14, image_token=tokenizer.decode([300]))
    generator = SwiresGenerator(model, processor, grammar="think")
    inputs = make_inputs(model, length=20, seed=1)
    for search in POLICIES:
        settings = {"max_new_tokens": 12, "return_dict_in_generate": True, "seed": 3}
        (answer,) = generator.generate(**inputs, search=search, **settings).answers
        alone = generator.generate(**inputs, search=search, **settings).answers[0]
        assert answer.tokens == alone.tokens and 0 < len(answer.tokens) <= 12
        assert answer.text == generator.decode(answer.tokens)
    assert generator.engine.pages_in_use == 0
