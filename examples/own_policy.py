"""A search policy of your own: it draws endings two at a time until three of them come to the same conclusion.

Run it with ``python examples/own_policy.py``. It needs no GPU and downloads nothing: the model is the bundled scale
model, and the questions are about coloured shapes. docs/search.md says what else a policy can do.
"""

import argparse
from collections import Counter

import torch

from llava_cot import SamplingParams, SwiresGenerator
from llava_cot.data import shapes
from llava_cot.scoring import confidence

AGREE = 3  # the search stops when so many endings agree
AT_MOST = 12  # it draws no more endings than this


def until_three_agree(search):
    """A policy is a generator function. ``yield from`` hands its requests to the engine, which batches them."""
    params = SamplingParams(temperature=1.0)
    # Draw one SUMMARY and one CAPTION. Every ending starts from this node, so its tokens are computed only once.
    (node,) = yield from search.expand([search.root], 1, "SUMMARY", params=params)
    if search.can_grow(node):  # a summary that ran into the token limit has no next stage
        (node,) = yield from search.expand([node], 1, "CAPTION", params=params)
    if not search.can_grow(node):
        return node

    endings, votes = [], Counter()
    while len(endings) < AT_MOST and max(votes.values(), default=0) < AGREE:
        # Stage None draws to the end of the answer. A candidate's seed comes from its index, so no two are alike.
        drawn = yield from search.expand([node], 2, None, params=params, first_index=len(endings))
        yield from search.score(drawn, confidence)
        endings += drawn
        votes = Counter(conclusion(search, ending) for ending in endings)

    # The most frequent conclusion wins. Among the endings that state it, the most confident one is the answer.
    winner, _ = votes.most_common(1)[0]
    best = search.best([ending for ending in endings if conclusion(search, ending) == winner])
    search.keep(endings, best)  # the trace shows which endings were kept
    return best


def conclusion(search, ending):
    """The text of the ending's CONCLUSION, or an empty string where it has none."""
    return search.grammar.parse(ending.text)[search.grammar.conclusion].text


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)  # the bundled model is so small that more threads make it slower
    generator = SwiresGenerator.from_pretrained("tiny")
    samples = [shapes.sample(seed) for seed in shapes.TEST_SEEDS[: args.questions]]
    images, questions = [sample.image for sample in samples], [sample.question for sample in samples]
    answers = generator.answer_batch(images, questions, until_three_agree, max_new_tokens=200)
    for sample, answer in zip(samples, answers):
        endings = sum(node["stage"] is None for node in answer.trace.data["nodes"])
        verdict = "right" if shapes.is_correct(sample, answer.conclusion) else f"wrong, the truth is {sample.answer}"
        print(f"{sample.question} {answer.conclusion} ({verdict}; {endings} endings)")


if __name__ == "__main__":
    main()
