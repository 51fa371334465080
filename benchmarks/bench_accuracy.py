"""How often the bundled tiny model is right on held-out questions, by search, with 95 % Wilson intervals.

``python benchmarks/bench_accuracy.py --out benchmarks/results/tiny_accuracy.json``. A scale model: the figures say how
the searches behave on it, nothing about the 11B model.
"""

import argparse
import json
import math
import re
from pathlib import Path

import torch

from llava_cot import (
    BestOfNConfig,
    GreedyConfig,
    MajorityConfig,
    SampleConfig,
    StageBeamConfig,
    SwiresConfig,
    SwiresGenerator,
    TokenBeamConfig,
)
from llava_cot.data import shapes

SEARCHES = {
    "greedy": GreedyConfig(max_new_tokens=200),
    "sample": SampleConfig(max_new_tokens=200),
    "best of 4": BestOfNConfig(max_new_tokens=200, n=4),
    "majority of 8": MajorityConfig(max_new_tokens=200),
    "token beam of 4": TokenBeamConfig(max_new_tokens=200),
    "stage beam": StageBeamConfig(max_new_tokens=200),
    "SWIRES, default": SwiresConfig(max_new_tokens=200),
    "SWIRES, published": SwiresConfig.published(max_new_tokens=200),
}
BATCH = 50


def wilson(right: int, n: int) -> tuple[float, float]:
    """The 95 % interval of a proportion."""
    z, p = 1.96, right / n
    center, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (center - half) / (1 + z * z / n), (center + half) / (1 + z * z / n)


CELL = "|".join(sorted(shapes.CELLS, key=len, reverse=True))


def objects(caption: str) -> list[tuple[str, ...]]:
    """(cell, colour, shape) of every object, whatever the words around them."""
    return re.findall(rf"({CELL}): (\w+) (\w+)", caption)


def measure(generator: SwiresGenerator, config, seeds: range) -> dict:
    right = tokens = captions = right_given_caption = oracle = 0
    for start in range(0, len(seeds), BATCH):
        samples = [shapes.sample(seed) for seed in seeds[start : start + BATCH]]
        answers = generator.answer_batch([s.image for s in samples], [s.question for s in samples], config)
        for sample, answer in zip(samples, answers):
            ok = shapes.is_correct(sample, answer.conclusion)
            seen = objects(answer.stages["CAPTION"].text) == objects(sample.stages["CAPTION"])
            right, captions, right_given_caption = right + ok, captions + seen, right_given_caption + (ok and seen)
            tokens += answer.usage.generated_tokens
            texts = [node["text"] for node in answer.trace.data["nodes"]]
            oracle += any(re.search(rf"<CONCLUSION>\s*{re.escape(sample.answer)}\s*</CONCLUSION>", t) for t in texts)
    n = len(seeds)
    low, high = wilson(right, n)
    return {
        "accuracy": right / n,
        "interval95": [round(low, 4), round(high, 4)],
        "caption_exact": captions / n,
        "accuracy_given_exact_caption": right_given_caption / max(captions, 1),
        "any_candidate_right": oracle / n,
        "tokens_per_question": tokens / n,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--searches", nargs="+", choices=SEARCHES, default=list(SEARCHES))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    generator = SwiresGenerator.from_pretrained(args.model)
    seeds = shapes.TEST_SEEDS[: args.questions]
    results = {}
    print("| search | accuracy | 95 % interval | exact captions | right given that | any candidate right | tokens |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name in args.searches:
        r = results[name] = measure(generator, SEARCHES[name], seeds)
        low, high = r["interval95"]
        print(
            f"| {name} | {r['accuracy']:.1%} | {low:.1%} to {high:.1%} | {r['caption_exact']:.1%} "
            f"| {r['accuracy_given_exact_caption']:.1%} | {r['any_candidate_right']:.1%} "
            f"| {r['tokens_per_question']:.0f} |",
            flush=True,
        )
    if args.out:
        data = {"seeds": [seeds[0], seeds[-1]], "results": results}
        args.out.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
