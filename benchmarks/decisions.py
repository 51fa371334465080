"""Every decision of every search on the same questions, written to a file, so that two commits can be compared.

    python benchmarks/decisions.py before.jsonl          # on one commit
    python benchmarks/decisions.py after.jsonl           # on the other
    python benchmarks/decisions.py after.jsonl --compare before.jsonl

One line holds one question and search: every candidate with its tokens and fate, every retrace, and the answer. A
difference is printed and ends the comparison with exit code 1. Scores are compared to 1e-4, everything else exactly.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

from llava_cot import Budget, SwiresConfig, SwiresGenerator
from llava_cot.data import shapes
from llava_cot.scoring import JudgeScorer

FIRST_SEED = 805_000
BATCH = 25
NODE = ("parent", "stage", "round", "index", "seed", "tokens", "finish", "closed", "violation", "kept")


def searches(generator: SwiresGenerator) -> dict[str, dict]:
    """The keyword arguments of each search, by the name of its row."""
    names = ("greedy", "sample", "best_of_n", "majority", "token_beam", "sentence_beam", "stage_beam", "swires")
    return {
        **{name: {"search": name} for name in names},
        "published": {"search": SwiresConfig.published()},
        "released": {"search": SwiresConfig.released()},
        "by_stage": {"search": SwiresConfig(scorer="by_stage", cutoff=0.5)},
        "judge": {"search": SwiresConfig(scorer=JudgeScorer(generator.processor), cutoff=0.5, max_rounds=2)},
        "budget": {"search": SwiresConfig.published(budget=Budget(generated_tokens=300))},
    }


def record(path: Path, questions: int, only: list[str]) -> None:
    generator = SwiresGenerator.from_pretrained("tiny")
    samples = [shapes.sample(FIRST_SEED + index) for index in range(questions)]
    with path.open("w") as file:
        for name, search in searches(generator).items():
            if only and name not in only:
                continue
            for start in range(0, questions, BATCH):
                batch = samples[start : start + BATCH]
                images, texts = [s.image for s in batch], [s.question for s in batch]
                answers = generator.answer_batch(images, texts, seed=start, max_new_tokens=160, **search)
                for index, answer in enumerate(answers, start):
                    data = answer.trace.data
                    row = {
                        "search": name,
                        "question": index,
                        "nodes": [{key: node[key] for key in NODE} for node in data["nodes"]],
                        "scores": [node["score"] for node in data["nodes"]],
                        "retraces": [[e["stage"], e["to"], e["round"]] for e in answer.trace.events("retraced")],
                        "answer": data["answer"],
                        "tokens": answer.tokens,
                    }
                    file.write(json.dumps(row) + "\n")
            print(f"{name}: {questions} questions", flush=True)


def compare(path: Path, before: Path) -> int:
    """The number of rows that differ; each is printed with the first field in which it does."""
    one, other = ([json.loads(line) for line in file.open()] for file in (before, path))
    places = {(row["search"], row["question"]): row for row in one}
    differ = 0
    for row in other:
        expected = places.pop((row["search"], row["question"]), None)
        fields = [name for name in row if name != "scores" and (expected is None or row[name] != expected[name])]
        if expected is not None and not fields and not _are_close(row["scores"], expected["scores"]):
            fields = ["scores"]
        if fields:
            differ += 1
            print(f"{row['search']} question {row['question']} differs in {fields}")
    print(f"{len(other)} rows compared, {differ} differ, {len(places)} are missing")
    return differ + len(places)


def _are_close(scores: list, expected: list) -> bool:
    pairs = zip(scores, expected, strict=True)
    return all(a == b or (None not in (a, b) and abs(a - b) < 1e-4) for a, b in pairs)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="file to write, or with --compare to read")
    parser.add_argument("--compare", type=Path, help="file of another commit to compare it with")
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--searches", nargs="*", default=[], help="rows to run (default: all)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.compare:
        return 1 if compare(options.path, options.compare) else 0
    record(options.path, options.questions, options.searches)
    return 0


if __name__ == "__main__":
    sys.exit(main())
