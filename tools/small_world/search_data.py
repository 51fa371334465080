"""Traces of the tiny policy on the shapes world, and what is learnt of them, as files.

``python -m tools.small_world.search_data OUT`` writes ``traces.jsonl`` and its images, and of those
``preferences.jsonl`` for ``objective: dpo`` and ``steps.jsonl`` for ``llava-cot train-reward``. The candidates of a
stage all go on, so that the right answers below each say how good it is: no scorer has a hand in it.
"""

import argparse
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from llava_cot.data import shapes
from llava_cot.data.export import export_file, write_jsonl
from llava_cot.generator import SwiresGenerator
from llava_cot.tiny import tiny_path

SEEDS = range(300_000, 303_000)  # neither the policy nor the bundled verifier was trained on them
QUESTIONS_AT_ONCE = 64
BEAM: dict[str, Any] = {
    "candidates": {"SUMMARY": 1, "CAPTION": 2, "REASONING": 8, "CONCLUSION": 8},
    "keep": {"SUMMARY": 1, "CAPTION": 2, "REASONING": 8, "CONCLUSION": 8},
    "temperature": 1.0,
    "top_p": 1.0,
    "max_new_tokens": 200,
}
PAIRS: dict[str, Any] = {"by": "answers", "min_margin": 0.5}  # two captions with four answers each may differ by chance


def write_search_data(out: Path, seeds: range, policy: Path, processes: int = 1) -> dict[str, int]:
    """Draw the traces of these seeds and write all files; returns how many rows each has, by its name."""
    if not seeds or seeds.start < 0 or seeds.stop > shapes.TEST_SEEDS.start:
        kept = shapes.TEST_SEEDS.start
        raise ValueError(f"seeds must be A:B with 0 <= A < B <= {kept}, got {seeds.start}:{seeds.stop}")
    (out / "images").mkdir(parents=True, exist_ok=True)
    groups = [seeds[start : start + QUESTIONS_AT_ONCE] for start in range(0, len(seeds), QUESTIONS_AT_ONCE)]
    draw = partial(_draw, out, policy)
    with ProcessPoolExecutor(processes) if processes > 1 else nullcontext() as pool:
        drawn = chain.from_iterable(pool.map(draw, groups) if pool else map(draw, groups))
        counts = {"traces": write_jsonl(drawn, out / "traces.jsonl")}
    formats: dict[str, dict[str, Any]] = {"preferences": PAIRS | {"model": str(policy)}, "steps": {}}
    for format, settings in formats.items():
        counts[format] = export_file(out / "traces.jsonl", out / f"{format}.jsonl", format, **settings)
    return counts


@cache
def _load(policy: Path) -> SwiresGenerator:
    torch.set_num_threads(1)  # two make so small a model slower
    return SwiresGenerator.from_pretrained(policy)


def _draw(out: Path, policy: Path, seeds: range) -> list[dict[str, Any]]:
    """The items of these seeds, all at once, their images in ``out / "images"``."""
    samples = [shapes.sample(seed) for seed in seeds]
    for seed, sample in zip(seeds, samples):
        sample.image.save(out / "images" / f"{seed}.png")
    images, questions = [s.image for s in samples], [s.question for s in samples]
    answers = _load(policy).answer_batch(images, questions, "stage_beam", seed=seeds[0], **BEAM)
    return [
        {"trace": answer.trace.data, "image": f"images/{seed}.png", "gold": sample.answer, "id": f"shapes-{seed}"}
        for seed, sample, answer in zip(seeds, samples, answers)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for the files")
    parser.add_argument("--policy", type=Path, default=tiny_path())
    parser.add_argument("--first-seed", type=int, default=SEEDS.start, help="of the samples")
    parser.add_argument("--questions", type=int, default=len(SEEDS))
    parser.add_argument("--processes", type=int, default=1)
    args = parser.parse_args()
    try:
        seeds = range(args.first_seed, args.first_seed + args.questions)
        counts = write_search_data(args.out, seeds, args.policy, args.processes)
    except ValueError as error:
        parser.error(str(error))
    print(", ".join(f"{count} {name}" for name, count in counts.items()))


if __name__ == "__main__":
    main()
