"""Score again what was answered before, without a model. No torch."""

import codecs
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from llava_cot.evaluate.benchmark import Benchmark
from llava_cot.evaluate.folder import find_questions
from llava_cot.evaluate.result import Result, Scored
from llava_cot.stages import Grammar


def with_questions(benchmark: Benchmark, results: Iterable[Result], source: str) -> list[Scored]:
    """Return each result with its question, in the order of the results.

    Raises:
        ValueError: a result is of no question of the benchmark, or two are of one question and repeat.
    """
    results, seen = list(results), set[tuple[str, int]]()
    for number, result in enumerate(results, 1):
        if (result.id, result.repeat) in seen:
            raise ValueError(f"{source}: each id must stand once, got {result.id!r} again as result {number}")
        seen.add((result.id, result.repeat))
    questions = find_questions(benchmark, {result.id for result in results})
    return [Scored(questions[result.id], result) for result in results]


def check_groups(benchmark: Benchmark, answered: Iterable[Scored], source: str) -> None:
    """Check that what counts only together, such as the rotations of a question, has all its answers in each repeat.

    Raises:
        ValueError: some is missing.
    """
    if not benchmark.is_grouped:
        return
    sizes = Counter(benchmark.question(row).group for row in range(len(benchmark)))
    found = Counter((each.question.group, each.result.repeat) for each in answered)
    for (group, repeat), count in found.items():
        if count < sizes[group]:
            raise ValueError(
                f"{source}: group {group!r} of {benchmark.title} counts as a whole, and has {count} of its "
                f"{sizes[group]} answers in repeat {repeat}"
            )


def score_all(benchmark: Benchmark, answered: Iterable[Scored], rules: str) -> Iterator[Scored]:
    """Yield the same answers with the verdicts of ``rules``. What could not be answered stays so."""
    for each in answered:
        if each.result.outcome == "failed":
            yield each
        else:
            verdict = benchmark.verdict(each.question, each.result.conclusion, rules)
            yield Scored(each.question, each.result.with_verdict(verdict))


def read_texts(path: Path, grammar: Grammar) -> Iterator[Result]:
    """Read a .jsonl of ``{"id": ..., "text": ...}`` and extract the conclusion of each text.

    ``"repeat"`` may be given too. A text may be a whole answer with its stages or the conclusion alone.

    Raises:
        ValueError: naming the line that can't be read.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if line.strip():
                row = _read_row(line, f"line {number} of {str(path)!r}")
                stage = grammar.conclusion_of(row["text"], grammar.parse(row["text"]))
                yield Result(
                    str(row["id"]),
                    row.get("repeat", 0),
                    row["text"],
                    stage.text,
                    str(stage.outcome),
                    None,
                    None,
                    None,
                    "",
                )


def _read_row(line: bytes, source: str) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict) or not isinstance(row.get("id"), (str, int)) or not isinstance(row.get("text"), str):
        raise ValueError(f'{source} must be an object with an "id" and a "text", got {line.strip()[:60]!r}')
    repeat = row.get("repeat", 0)
    if not isinstance(repeat, int) or isinstance(repeat, bool) or repeat < 0:
        raise ValueError(f"{source}: repeat must be an integer >= 0, got {repeat!r}")
    return row
