"""Score a tree of steps by a step reward model, reading only what is new and reading every path as a whole.

``python benchmarks/bench_step_reward.py`` uses a random Qwen2.5-VL of about 40M parameters, whose image of 448 x 448
pixels is 256 tokens, on the CPU. One question has 4 candidates at each of 4 stages. All candidates of a stage continue
the first one of the stage before it. The chat is Qwen-VL-PRM's, with random words in place of its system prompt, the
question and the steps.

Both ways are a ``StepRewardScorer`` on the same weights, and score the four candidates of a stage in one call:

- incremental: on an engine, which keeps the image and the steps that were read before.
- full: transformers' forward pass over the whole of each text, the four texts as one batch.

Their scores must be equal to 1e-4, or the run fails. Each way scores the whole tree several times, in turns, and the
medians are reported. The engine starts without the question each time.
"""

import argparse
import random
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
from PIL import Image
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from bench_search import STAGE_TOKENS, environment
from helpers.step_models import build_qwen_processor
from timing import Results, measure

from llava_cot.scoring import QWEN_VL_PRM, Span
from llava_cot.scoring.step_reward import StepRewardScorer

MODEL = dict(hidden=512, layers=8, heads=8, kv_heads=4, ffn=1408, vocab=8000, vision_hidden=256, vision_layers=8)
CANDIDATES, SYSTEM_TOKENS, QUESTION_TOKENS, SIDE = 4, 170, 30, 448
TOLERANCE = 1e-4
WORDS = ("red", "blue", "cube", "sphere", "left", "right", "behind", "two", "three", "is", "are", "so", "the", "of")


def build_model(hidden, layers, heads, kv_heads, ffn, vocab, vision_hidden, vision_layers, *, tokens: dict[str, int]):
    """Build a random Qwen2.5-VL in float32; ``tokens`` are the ids of its image and video tokens."""
    torch.manual_seed(0)
    half = hidden // heads // 2
    text = dict(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [half - 2 * (half // 3), half // 3, half // 3],
        },
        tie_word_embeddings=False,
    )
    vision = dict(
        depth=vision_layers,
        hidden_size=vision_hidden,
        intermediate_size=2 * vision_hidden,
        num_heads=max(1, vision_hidden // 64),
        out_hidden_size=hidden,
        fullatt_block_indexes=[vision_layers - 1],
    )
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.06)
    return model.eval()


def words_of(tokenizer, seed: int) -> Callable[[int], str]:
    """Return a function that makes a text of so many tokens, or one more."""
    rng = random.Random(seed)

    def words(count: int) -> str:
        text = ""
        while len(tokenizer(text, add_special_tokens=False)["input_ids"]) < count:
            text = f"{text} {rng.choice(WORDS)}".strip()
        return text

    return words


def make_tree(words: Callable[[int], str], image: Image.Image) -> list[list[dict]]:
    """Return the arguments of the spans of each stage."""
    question, before, stages = words(QUESTION_TOKENS), "", []
    for stage, tokens in STAGE_TOKENS.items():
        texts = [f"<{stage}> {words(tokens)} </{stage}>\n\n" for _ in range(CANDIDATES)]
        shown = {"question": question, "load_images": lambda: [image], "stage": stage}
        stages.append([{"text": text, "path_text": before + text, **shown} for text in texts])
        before += texts[0]
    return stages


def score(scorer: StepRewardScorer, tree: list[list[dict]]) -> list[float]:
    """Score one stage after the other, as a search does."""
    memo: dict = {}
    spans = [[Span(tokens=[], logprobs=[], entropies=[], memo=memo, **one) for one in stage] for stage in tree]
    return [found for stage in spans for found in scorer.get_scores(stage)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="write the figures to this JSON file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    processor = build_qwen_processor(patch_size=14, pixels=SIDE * SIDE)
    ids = processor.tokenizer.convert_tokens_to_ids
    names = ("vision_start", "vision_end")
    tokens = {f"{name}_token_id": ids(f"<|{name}|>") for name in names}
    tokens |= {f"{name}_token_id": ids(f"<|{name}_pad|>") for name in ("image", "video")}
    model = build_model(**MODEL, tokens=tokens)
    words = words_of(processor.tokenizer, seed=0)
    format = replace(QWEN_VL_PRM, system=words(SYSTEM_TOKENS))
    tree = make_tree(words, Image.effect_noise((SIDE, SIDE), 64).convert("RGB"))
    scorers = {
        name: StepRewardScorer(model, processor, format=format, incremental=name == "incremental")
        for name in ("full", "incremental")
    }
    full, incremental = (score(scorer, tree) for scorer in scorers.values())
    difference = max(abs(one - other) for one, other in zip(full, incremental, strict=True))
    if difference > TOLERANCE:
        sys.exit(f"the scores must be equal to {TOLERANCE}, got a difference of {difference}")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    settings = {"parameters": parameters, "candidates": CANDIDATES, "stage_tokens": STAGE_TOKENS}
    results = Results(
        args.json,
        benchmark="bench_step_reward",
        **environment(args.threads, "cpu"),
        **settings,
        image_tokens=(SIDE // 28) ** 2,
        repeats=args.repeats,
        largest_difference=difference,
    )
    calls = {name: (lambda scorer=scorer: score(scorer, tree)) for name, scorer in scorers.items()}
    found = measure(calls, args.repeats, warmup=1)
    print("| way | median | 20 % to 80 % | ratio |\n| --- | --- | --- | --- |")
    for name in ("incremental", "full"):
        ratio = found[name].median / found["incremental"].median
        results.add({"way": name, "ms": asdict(found[name]), "ratio": ratio})
        low, high = found[name].low / 1e3, found[name].high / 1e3
        print(f"| {name} | {found[name].median / 1e3:.2f} s | {low:.2f} to {high:.2f} s | {ratio:.1f}x |")
    print(f"largest difference of a score: {difference:.1e}")


if __name__ == "__main__":
    main()
