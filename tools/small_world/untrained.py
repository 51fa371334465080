"""The tiny Mllama with random weights: ``python -m tools.small_world.untrained OUT``."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import MllamaConfig, MllamaForConditionalGeneration, MllamaProcessor, ProcessorMixin
from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig

from llava_cot.data import shapes
from tools.small_world.processor import VOCAB_SIZE, build_processor


def build_config(processor: MllamaProcessor) -> MllamaConfig:
    tokenizer = processor.tokenizer
    text = MllamaTextConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        cross_attention_layers=[1, 4],
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    vision = MllamaVisionConfig(
        hidden_size=80,
        intermediate_size=160,
        num_hidden_layers=3,
        num_global_layers=1,
        attention_heads=4,
        image_size=shapes.SIZE,
        patch_size=shapes.CELL,
        max_num_tiles=1,
        supported_aspect_ratios=[[1, 1]],
        intermediate_layers_indices=[1],
        vision_output_dim=80 * 2,
    )
    return MllamaConfig(text_config=text, vision_config=vision, image_token_index=VOCAB_SIZE)


def build_model(
    processor: MllamaProcessor, seed: int, config: MllamaConfig | None = None
) -> MllamaForConditionalGeneration:
    torch.manual_seed(seed)
    model = MllamaForConditionalGeneration(config or build_config(processor))
    with torch.no_grad():  # the gates start at zero, and behind a closed gate the image is never seen
        for name, parameter in model.named_parameters():
            if name.endswith(("cross_attn_attn_gate", "cross_attn_mlp_gate", "gate_attn", "gate_ffn")):
                parameter.fill_(1.0)
    generation = model.generation_config
    generation.bos_token_id, generation.pad_token_id = (
        processor.tokenizer.bos_token_id,
        processor.tokenizer.pad_token_id,
    )
    generation.eos_token_id = processor.tokenizer.eos_token_id
    return model


def write_untrained(description: str | None, build_model: Callable[..., Any], processor: ProcessorMixin) -> None:
    """Write the model and its processor to the folder that the command line names."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("out", type=Path, help="folder for the model and its processor")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model = build_model(processor, args.seed)
    model.save_pretrained(args.out)
    processor.save_pretrained(args.out)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters in {args.out}")


if __name__ == "__main__":
    write_untrained(__doc__, build_model, build_processor())
