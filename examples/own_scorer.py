"""A scorer of your own: it counts the objects in the image itself, and doubts a candidate that counted otherwise.

Run it with ``python examples/own_scorer.py``. It needs no GPU and downloads nothing: the model is the bundled scale
model, and the questions are about coloured shapes in a grid of 3 x 3 cells. It compares best-of-8 by this scorer with
best-of-8 by the model's own confidence. docs/search.md says what else a scorer can do.
"""

import argparse
import re

import numpy as np
import torch

from llava_cot import SwiresGenerator
from llava_cot.data import shapes
from llava_cot.scoring import confidence


def counts_right(spans):
    """A scorer is a function from candidates to one number each, and the larger number is better.

    False counts come first. The model's confidence, a mean log-prob in nats, decides among the rest.
    """
    return [sure - 10.0 * false_counts(span) for span, sure in zip(spans, confidence(spans))]


def false_counts(span):
    """How many counts in the reasoning differ from the image: of all objects, and of the objects of one colour."""
    reasoning = span.grammar.parse(span.path_text)["REASONING"].text
    colors = colors_in(span.image)
    said = [(number, color) for number, color in re.findall(r"(\d+) (?:(\w+) )?objects", reasoning)]
    said += [(number, color) for color, number in re.findall(r"of (\w+) objects is (\d+)", reasoning)]
    return sum(int(number) != (colors.count(color) if color else len(colors)) for number, color in said)


def colors_in(image):
    """The colour of every cell that has an object in it, from the mean of the pixels at its middle."""
    cells = np.asarray(image, dtype=float).reshape(3, shapes.CELL, 3, shapes.CELL, 3)  # row, y, column, x, channel
    middles = cells[:, 6:10, :, 6:10].mean(axis=(1, 3)).reshape(9, 3)
    known = {"grey": (128, 128, 128), **shapes.COLORS}  # the background is grey
    found = [min(known, key=lambda name: np.abs(middle - known[name]).sum()) for middle in middles]
    return [color for color in found if color != "grey"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--candidates", type=int, default=8)
    args = parser.parse_args()
    torch.set_num_threads(1)  # the bundled model is so small that more threads make it slower
    generator = SwiresGenerator.from_pretrained("tiny")
    samples = [shapes.sample(seed) for seed in shapes.TEST_SEEDS[: args.questions]]
    images, questions = [sample.image for sample in samples], [sample.question for sample in samples]
    for scorer in (confidence, counts_right):
        settings = {"n": args.candidates, "temperature": 1.0, "top_p": 1.0, "max_new_tokens": 200}
        answers = generator.answer_batch(images, questions, "best_of_n", scorer=scorer, **settings)
        right = sum(shapes.is_correct(sample, answer.conclusion) for sample, answer in zip(samples, answers))
        print(f"best of {args.candidates} by {scorer.__name__}: {right} of {len(samples)} right")


if __name__ == "__main__":
    main()
