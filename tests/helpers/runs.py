"""Runs to summarise, compare and lay out: benchmarks whose questions are made here, and folders of runs."""

import json
from dataclasses import asdict
from pathlib import Path

from llava_cot.evaluate.benchmark import Benchmark, Dataset
from llava_cot.evaluate.benchmarks import BENCHMARKS
from llava_cot.evaluate.pages.report import write_report
from llava_cot.evaluate.question import Question
from llava_cot.evaluate.result import Result, Scored
from llava_cot.evaluate.summary import summarise


class Letters(Benchmark):
    """Questions whose answer is a letter; every fourth is of category (even, fours)."""

    name, title = "letters", "Letters"
    count = 40

    def __init__(self, path=None, *, allow_partial=False):
        self.dataset = Dataset(None, "letters-1", None, rows=self.count)

    def __len__(self):
        return self.count

    def question(self, number):
        kind = ("even", "fours" if number % 4 == 0 else "twos") if number % 2 == 0 else ("odd",)
        choices = {"A": "one <b>", "B": "two"}
        return Question(f"q{number}", "choice", f"Question {number}?", "A", choices, category=kind)

    def images(self, number):
        return ()


class Circular(Letters):
    """Four rotations of each question, all of which have to be right."""

    name, title, headline = "circular", "Circular", "circular"

    def question(self, number):
        return Question(f"q{number}", "choice", "?", "A", group=f"g{number // 4}", category=("all",))

    def tally(self, questions, scores):
        return {"circular": (float(all(score >= 1 for score in scores)), 1), "accuracy": (sum(scores), len(scores))}


class Mean(Circular):
    """A headline that is made of two others."""

    name, title, headline = "mean", "Mean", "mean"

    def derive(self, metrics):
        return dict(metrics) | {"mean": (metrics["circular"] + metrics["accuracy"]) / 2}


class Graded(Letters):
    name, title = "graded", "Graded"

    def question(self, number):
        return Question(f"q{number}", "graded", "?", "A", fields={"capability": f"c{number % 3}"})

    def tally(self, questions, scores):
        return {"accuracy": (sum(scores), len(scores)), questions[0].fields["capability"]: (sum(scores), len(scores))}


MADE = (Letters, Circular, Mean, Graded)


def register(monkeypatch):
    """Let commands find these benchmarks by their names."""
    for benchmark in MADE:
        monkeypatch.setitem(BENCHMARKS, benchmark.name, benchmark)


def result(number, score, repeat=0, tokens=100, **changes):
    """The result of question ``number``; a score of "failed" is a question without an answer."""
    if score == "failed":
        return Result(f"q{number}", repeat, "", "", "failed", None, None, None, "no answer", error="out of <memory>")
    extracted = None if score is None else "A" if score else "B"
    text = f"<SUMMARY>Say a letter.</SUMMARY><CONCLUSION>{extracted or '?'}</CONCLUSION>"
    usage = {"generated_tokens": tokens, "generations": 1, "prompt_tokens": 9, "seconds": 0.5, "retraces": 0}
    row = Result(
        f"q{number}", repeat, text, extracted or "?", "complete", score, None if score is None else score >= 1,
        extracted, "letter", usage,
    )  # fmt: skip
    return Result(**row.to_dict() | changes)


def scored(benchmark, scores, repeat=0):
    """The results of the first questions with these scores."""
    return [Scored(benchmark.question(n), result(n, score, repeat, 100 + n)) for n, score in enumerate(scores)]


def protocol_of(benchmark, /, **changes):
    protocol = {
        "benchmark": benchmark.name,
        "dataset": asdict(benchmark.dataset),
        "preset": "plain",
        "rules": "compat",
        "model": "tiny",
        "model_sha256": "abc",
        "search": "greedy",
        "settings": {"max_new_tokens": 200},
        "seed": 0,
        "limit": None,
        "repeats": 1,
    }
    return protocol | changes


def write_run(folder, benchmark, rows, /, **changes):
    """Write the folder of a finished run, and return its path."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    protocol = protocol_of(benchmark, **changes)
    (folder / "run.json").write_text(json.dumps(protocol))
    (folder / "results.jsonl").write_text("".join(json.dumps(each.result.to_dict()) + "\n" for each in rows))
    summary = summarise(benchmark, rows, protocol)
    (folder / "summary.json").write_text(json.dumps(summary, allow_nan=False))
    write_report(folder, summary, rows)
    return folder
