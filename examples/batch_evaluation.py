"""Evaluate a search: it answers 50 questions of the bundled world as one batch, and prints how many are right.

Run it with ``python examples/batch_evaluation.py --search stage_beam``. It needs no GPU and downloads nothing. Fifty
questions are few, so the interval is wide: a difference between two searches that lies inside it may be chance.
"""

import argparse

import torch

from llava_cot import SwiresGenerator
from llava_cot.data import shapes
from llava_cot.evaluate.statistics import wilson


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=50)
    parser.add_argument("--search", default="greedy", help="the name of a search, as docs/search.md lists them")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)  # the bundled model is so small that more threads make it slower
    generator = SwiresGenerator.from_pretrained("tiny")  # or a model folder or hub name, and device="cuda"

    # Nothing was trained, calibrated or tuned on the questions of these seeds.
    samples = [shapes.sample(seed) for seed in shapes.TEST_SEEDS[: args.questions]]
    images, questions = [sample.image for sample in samples], [sample.question for sample in samples]

    # One call is one continuous batch: all candidates of all questions are decoded together. A search that fails
    # stands in the list as its exception, and counts as a wrong answer.
    answers = generator.answer_batch(
        images, questions, args.search, seed=args.seed, max_new_tokens=200, return_exceptions=True
    )
    right = generated = failed = 0
    for sample, answer in zip(samples, answers):
        if isinstance(answer, Exception):
            failed += 1
            continue
        right += shapes.is_correct(sample, answer.conclusion)
        generated += answer.usage.generated_tokens

    total = len(samples)
    low, high = wilson(right, total)
    print(f"search: {args.search}, {total} questions, {failed} failed")
    print(f"right: {right} of {total} = {right / total:.1%} (95 % interval {low:.1%} to {high:.1%})")
    print(f"generated tokens per question: {generated / total:.0f}")


if __name__ == "__main__":
    main()
