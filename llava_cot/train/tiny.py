"""The tiny Mllama before its training: ``python -m llava_cot.train.tiny OUT`` writes it with random weights.

With ``--steps`` it is trained on the shapes world by a plain single-process loop: every batch is made on the fly from
fresh seeds, the loss is on the assistant's turn only.
"""

import argparse
import time
from pathlib import Path

import torch
from transformers import (
    MllamaConfig,
    MllamaForConditionalGeneration,
    MllamaProcessor,
    get_cosine_schedule_with_warmup,
)
from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig

from llava_cot.data import shapes
from llava_cot.stages import render
from llava_cot.train.tiny_processor import VOCAB_SIZE, build_processor


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


def build_model(processor: MllamaProcessor, seed: int) -> MllamaForConditionalGeneration:
    torch.manual_seed(seed)
    model = MllamaForConditionalGeneration(build_config(processor))
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


def make_batch(processor: MllamaProcessor, seeds: list[int]) -> dict[str, torch.Tensor]:
    """Model inputs and labels of these samples, right-padded; one BOS, and -100 on everything but the answer."""
    samples = [shapes.sample(seed) for seed in seeds]
    prompts = [prompt(processor, s.question) for s in samples]
    answers = [render(s.stages) + processor.tokenizer.eos_token for s in samples]
    batch = processor(
        images=[[s.image] for s in samples],
        text=[p + a for p, a in zip(prompts, answers)],
        add_special_tokens=False,
        padding=True,
        padding_side="right",
        return_tensors="pt",
    )
    labels = batch["input_ids"].clone()
    labels[batch["attention_mask"] == 0] = -100
    for row, ids in enumerate(processor.tokenizer(prompts, add_special_tokens=False)["input_ids"]):
        labels[row, : len(ids)] = -100
    return {**batch, "labels": labels}


def prompt(processor: MllamaProcessor, question: str) -> str:
    content = [{"type": "image"}, {"type": "text", "text": question}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def train(
    model, processor, *, steps: int, stop: int | None, first_seed: int, batch_size: int, lr: float, bf16: bool
) -> None:
    """AdamW with warm-up and cosine, on fresh samples from ``first_seed`` up; ``bf16`` computes in bfloat16."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=80, num_training_steps=steps)
    model.train()
    start = time.monotonic()
    for step in range(min(steps, stop or steps)):
        start_seed = first_seed + step * batch_size
        batch = make_batch(processor, list(range(start_seed, start_seed + batch_size)))
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(f"step {step} minute {(time.monotonic() - start) / 60:.1f} loss {loss.item():.4f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder for the model and its processor")
    parser.add_argument("--init", type=Path, help="go on from this model instead of a random one")
    parser.add_argument("--first-seed", type=int, default=0, help="of the training samples")
    parser.add_argument("--steps", type=int, default=0, help="of training; none: the weights stay random")
    parser.add_argument("--stop", type=int, help="leave the schedule after so many steps: a model that still errs")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--threads", type=int, default=1, help="one is faster than two for so small a model")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    processor = build_processor()
    model = (
        MllamaForConditionalGeneration.from_pretrained(args.init) if args.init else build_model(processor, args.seed)
    )
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters")
    if args.first_seed + args.steps * args.batch_size > shapes.TEST_SEEDS.start:
        parser.error("training must not reach the test seeds")
    if args.steps:
        schedule = {"steps": args.steps, "stop": args.stop, "first_seed": args.first_seed, "lr": args.lr}
        train(model, processor, **schedule, batch_size=args.batch_size, bf16=args.bf16)
    model.save_pretrained(args.out)
    processor.save_pretrained(args.out)


if __name__ == "__main__":
    main()
