"""The tiny Qwen2.5-VL before its training: ``python -m tools.small_world.untrained_qwen OUT``.

Qwen2.5-VL was trained from a language model. So is this one: its text layers, embeddings and head begin as those of the
bundled Mllama, which has the same widths and the same BPE. Its vision encoder is random, and so is the attention of the
two layers where the Mllama has cross-attention instead.
"""

from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
)

from llava_cot.data import shapes
from llava_cot.families.qwen_processor import QwenImageTextProcessor
from llava_cot.tiny import tiny_path
from tools.small_world.processor import byte_pairs
from tools.small_world.untrained import write_untrained

PATCH, MERGE = shapes.CELL // 2, 2  # an image token is a cell of the world's grid
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def build_processor() -> QwenImageTextProcessor:
    """Make the processor: the tiny Mllama's BPE with Qwen's special tokens, and images of about 48 x 48 pixels."""
    tokenizer = byte_pairs(len(SPECIAL_TOKENS))
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens={"image_token": "<|image_pad|>"},
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
    image_processor = Qwen2VLImageProcessorPil(
        size={"shortest_edge": shapes.SIZE**2, "longest_edge": shapes.SIZE**2},
        patch_size=PATCH,
        merge_size=MERGE,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return QwenImageTextProcessor(image_processor, wrapped, chat_template=CHAT_TEMPLATE)


def build_config(processor: QwenImageTextProcessor) -> Qwen2_5_VLConfig:
    tokenizer = processor.tokenizer
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    text = dict(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
        bos_token_id=None,
        eos_token_id=ids["<|im_end|>"],
        pad_token_id=ids["<|endoftext|>"],
        tie_word_embeddings=False,
    )
    vision = dict(
        depth=3,
        hidden_size=80,
        intermediate_size=160,
        num_heads=4,
        out_hidden_size=128,
        patch_size=PATCH,
        spatial_merge_size=MERGE,
        window_size=shapes.SIZE,  # an image is one window: transformers computes each window by itself
        fullatt_block_indexes=[2],
    )
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )


def build_model(
    processor: QwenImageTextProcessor,
    seed: int,
    config: Qwen2_5_VLConfig | None = None,
    language_model: Path | None = None,
) -> Qwen2_5_VLForConditionalGeneration:
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config or build_config(processor))
    if language_model is not None:
        _start_text(model, load_file(language_model / "model.safetensors"))
    generation = model.generation_config
    generation.pad_token_id = processor.tokenizer.pad_token_id
    generation.eos_token_id = processor.tokenizer.eos_token_id
    return model


@torch.no_grad()
def _start_text(model: Qwen2_5_VLForConditionalGeneration, mllama: dict[str, torch.Tensor]) -> None:
    """Copy the weights of an Mllama's language model, all but those of its cross-attention and special tokens."""
    ours = model.state_dict()
    for name, weight in mllama.items():
        part, _, rest = name.removeprefix("language_model.").partition(".")
        if not name.startswith("language_model.") or ".cross_attn" in name:
            continue
        target = ours[f"model.language_model.{rest}" if part == "model" else f"{part}.{rest}"]
        if target.shape[:1] == (model.config.text_config.vocab_size,):
            words = model.config.text_config.vocab_size - len(SPECIAL_TOKENS)
            target[:words] = weight[:words]
        elif rest.endswith("mlp.down_proj.weight") and (gate := mllama.get(_gate_of(name))) is not None:
            target.copy_(weight * gate.tanh())
        else:
            target.copy_(weight)


def _gate_of(name: str) -> str:
    return name.replace("mlp.down_proj.weight", "cross_attn_mlp_gate")


if __name__ == "__main__":
    write_untrained(__doc__, partial(build_model, language_model=tiny_path()), build_processor())
