"""Families whose images have any shape count their tokens as transformers' own processors do."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Idefics3Processor, LlavaNextProcessor, LlavaOnevisionProcessor, ProcessorMixin
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

from llava_cot.check.random_models import IMAGE_SIZE, PATCH_SIZE, PINPOINTS, build_config
from llava_cot.prompt import split_rows

TOKEN = "<|image|>"
SIZES = [(1, 1), (300, 1), (1, 300), (41, 37), (37, 41), (56, 28), (200, 90), (28, 28), (500, 333)]  # width, height
GROUPS = [[0], [1], [2], [3], [4], [5], [6], [7], [8]], [[0, 3], [6], []], [[4, 5, 8]], [[], [7]]


class OnevisionWithoutVideos(LlavaOnevisionProcessor):
    """LLaVA-OneVision's processor without its part for videos, which needs torchvision."""

    @classmethod
    def get_attributes(cls):
        return ["image_processor", "tokenizer"]

    def __init__(self, image_processor, tokenizer):
        self.num_image_tokens, self.vision_feature_select_strategy = 4, "full"
        self.image_token, self.video_token, self.vision_aspect_ratio = TOKEN, "<video>", "anyres_max_2"
        self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids(TOKEN), None
        ProcessorMixin.__init__(self, image_processor, tokenizer)


def llava_next(tokenizer):
    image_processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_grid_pinpoints=PINPOINTS,
    )
    settings = {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1, "image_token": TOKEN}
    return LlavaNextProcessor(image_processor, tokenizer, patch_size=PATCH_SIZE, **settings)


def llava_onevision(tokenizer):
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return OnevisionWithoutVideos(LlavaOnevisionImageProcessorPil(size=size, image_grid_pinpoints=PINPOINTS), tokenizer)


def idefics3(tokenizer):
    tokens = ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>"]
    tokenizer.add_special_tokens({"extra_special_tokens": tokens})
    sizes = {"size": {"longest_edge": 112}, "max_image_size": {"longest_edge": 2 * IMAGE_SIZE}}
    return Idefics3Processor(Idefics3ImageProcessorPil(**sizes), tokenizer, image_seq_len=4)


@pytest.mark.parametrize("build", [llava_next, llava_onevision, idefics3], ids=lambda build: build.__name__)
def test_a_batch_is_what_each_prompt_is_alone(tiny, build):
    processor = build(copy.deepcopy(tiny.processor.tokenizer))
    image_token = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    config = build_config(build.__name__, vocab=len(processor.tokenizer) + 4, image_token=image_token)
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in SIZES]

    def inputs(groups):
        texts = [processor.image_token * len(group) + " hello" for group in groups]
        shown = [[images[index] for index in group] for group in groups]
        return dict(processor(images=shown if any(shown) else None, text=texts, padding=True, return_tensors="pt"))

    compared = 0
    for groups in GROUPS:
        for group, row in zip(groups, split_rows(inputs(groups), config), strict=True):
            (alone,) = split_rows(inputs([group]), config)
            assert row.keys() == alone.keys() and ("pixel_values" in row) == bool(group)
            assert all(torch.equal(row[name], alone[name]) for name in alone), group
            compared += 1
    assert compared == 15
