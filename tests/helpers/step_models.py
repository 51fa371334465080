"""Random step reward models with real processors, on the bundled tokenizer."""

import copy

import torch
from transformers import AutoProcessor, LlavaProcessor, MllamaForConditionalGeneration, Qwen2_5_VLProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from helpers.random_llava import IMAGE_SIZE, PATCH_SIZE, build_random_llava, build_random_qwen2_5_vl
from llava_cot import tiny_path


class ImagesOnly(Qwen2_5_VLProcessor):
    """Qwen2.5-VL's processor without its part for videos, which needs torchvision."""

    @classmethod
    def get_attributes(cls):
        return ["image_processor", "tokenizer"]

    def __init__(self, image_processor, tokenizer, chat_template):
        super().__init__(image_processor, tokenizer, chat_template=chat_template)


def build_llava_processor():
    tiny = AutoProcessor.from_pretrained(tiny_path())
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=size),
        tiny.tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        image_token="<|image|>",
        num_additional_image_tokens=1,
        chat_template=tiny.chat_template,
    )


def build_qwen_processor(*, patch_size=4, pixels=24 * 24):
    """Images are scaled to at most ``pixels``. A token stands for 2 x 2 patches."""
    tiny = AutoProcessor.from_pretrained(tiny_path())
    tokenizer = copy.deepcopy(tiny.tokenizer)
    tokens = ["<|vision_start|>", "<|vision_end|>", "<|video_pad|>", "<|image_pad|>"]
    tokenizer.add_special_tokens({"extra_special_tokens": tokens})
    tokenizer.image_token = tokens[-1]
    image_processor = Qwen2VLImageProcessorPil(
        patch_size=patch_size, merge_size=2, min_pixels=(2 * patch_size) ** 2, max_pixels=pixels
    )
    template = tiny.chat_template.replace("<|image|>", "<|vision_start|><|image_pad|><|vision_end|>")
    return ImagesOnly(image_processor, tokenizer, template)


def softened(model):
    """A head with which no verdict is certain."""
    with torch.no_grad():
        model.lm_head.weight.mul_(0.1)
    return model


def build_llava(**sizes):
    """(model, processor)"""
    processor = build_llava_processor()
    tokenizer = processor.tokenizer
    image_token = tokenizer.convert_tokens_to_ids("<|image|>")
    return softened(build_random_llava(vocab=len(tokenizer), image_token=image_token, **sizes)), processor


def build_qwen(**sizes):
    """(model, processor)"""
    processor = build_qwen_processor()
    return softened(build_random_qwen2_5_vl(vocab=len(processor.tokenizer), **sizes)), processor


def load_mllama():
    """(model, processor): the bundled model. It was trained on other chats, but the engine must read the same."""
    return (
        softened(MllamaForConditionalGeneration.from_pretrained(tiny_path())),
        AutoProcessor.from_pretrained(tiny_path()),
    )


STEP_MODELS = {"llava": build_llava, "qwen2_5_vl": build_qwen, "mllama": load_mllama}
