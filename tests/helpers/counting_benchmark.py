"""A benchmark of a few made-up rows, optionally read from a TSV in VLMEvalKit's layout."""

import csv

from llava_cot.evaluate.benchmark import Benchmark, Dataset
from llava_cot.evaluate.question import Question
from llava_cot.evaluate.result import Result


class CountingBenchmark(Benchmark):
    """Row n asks which of four numbers is n; its letter is A, B, C or D in turn."""

    name = "counting"
    title = "Counting"

    def __init__(self, count, path=None, *, allow_partial=False):
        self.count, self.dataset = count, Dataset(path and str(path), "0", None, rows=count)

    def __len__(self):
        return self.count

    def question(self, number):
        choices = {letter: str(number + 10 * at) for at, letter in enumerate("ABCD")}
        return Question(f"{number}", "choice", f'Which is\t"{number}"?', "ABCD"[number % 4], choices=choices)

    def images(self, number):
        return ()


def write_tsv(benchmark, path):
    with open(path, "w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, delimiter="\t")
        table.writerow(["index", "image", "question", *"ABCD", "answer", "category"])
        for number in range(len(benchmark)):
            asked = benchmark.question(number)
            row = [asked.id, "iVBOR" * 60_000, asked.text, *asked.choices.values(), asked.answer, "count"]
            table.writerow(row)


def results_of(benchmark, conclusions=None):
    """One result a row, in reverse order, with a second repeat that says something else."""
    texts = conclusions or [f"answer {number}" for number in range(len(benchmark))]
    first = [Result(f"{at}", 0, "", text, "complete", None, None, None, "") for at, text in enumerate(texts)]
    second = [Result(f"{at}", 1, "", "again", "complete", None, None, None, "") for at in range(len(texts))]
    return [*reversed(first), *second]
