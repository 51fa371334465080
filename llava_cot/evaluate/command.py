"""What the commands evaluate and score do, from their arguments to the files of the run folder."""

import json
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava_cot.atomic import replacing
from llava_cot.evaluate.benchmark import Benchmark
from llava_cot.evaluate.benchmarks import benchmark_class, open_benchmark
from llava_cot.evaluate.folder import PROTOCOL, SUMMARY, asked, find_questions, open_evaluated, selected
from llava_cot.evaluate.judge import read_grades, with_grades
from llava_cot.evaluate.manifest import make_manifest, read_manifest, write_manifest
from llava_cot.evaluate.pages.report import write_report
from llava_cot.evaluate.progress import shown
from llava_cot.evaluate.result import Scored
from llava_cot.evaluate.rules import RULES
from llava_cot.evaluate.run import RunFolder, check_folder, check_writable, run
from llava_cot.evaluate.score import check_groups, read_texts, score_all, with_questions
from llava_cot.evaluate.summary import summarise
from llava_cot.grammars import named_grammar
from llava_cot.search import make_plan
from llava_cot.search.plan import settings_of
from llava_cot.stages import LLAVA_COT
from llava_cot.workers.names import check_scorer_name, check_workers
from llava_cot.workers.open import open_workers
from llava_cot.workers.task import ModelSettings

GRADES = "grades.jsonl"  # in the folder of a run that a judge has graded


@dataclass(frozen=True)
class Request:
    """The arguments of ``llava-cot evaluate``, which its help explains."""

    benchmark: str
    out: Path
    data: Path | None = None
    model: str = "tiny"
    search: str = "greedy"
    settings: dict[str, Any] = field(default_factory=dict)
    scorer: str | None = None
    preset: str | None = None
    rules: str | None = None
    limit: int | None = None
    repeats: int = 1
    seed: int = 0
    max_new_tokens: int = 2048
    grammar: str | None = None
    system: str | None = None
    device: str | None = None
    dtype: str = "auto"
    quantize: str | None = None
    workers: str = "local"
    in_flight: int = 64
    traces: str = "wrong"
    partial: bool = False

    def model_settings(self) -> ModelSettings:
        """What a worker loads and searches with."""
        return ModelSettings(
            model=self.model, search=self.search, settings={"max_new_tokens": self.max_new_tokens, **self.settings},
            scorer=self.scorer, device=self.device, dtype=self.dtype, quantize=self.quantize, grammar=self.grammar,
            system=self.system,
        )  # fmt: skip


def evaluate_benchmark(request: Request, *, dry_run: bool = False) -> dict[str, Any] | None:
    """Do what is left of a run and return its summary; with ``dry_run`` only print the plan.

    Raises:
        ValueError, TypeError: naming the argument that is wrong, before any weights are loaded.
    """
    most = _check_search(request)
    check_workers(request.workers)
    benchmark = open_benchmark(request.benchmark, request.data, allow_partial=request.partial)
    rules = _check_rules(benchmark, request.rules)
    preset = request.preset or benchmark.default_preset
    benchmark.prompt(benchmark.question(0), preset)  # raises if there is no such preset
    settings = request.model_settings()
    manifest = make_manifest(
        benchmark,
        settings,
        preset=preset,
        rules=rules,
        seed=request.seed,
        limit=request.limit,
        repeats=request.repeats,
    )
    check_folder(request.out, manifest)
    rows = selected(benchmark, request.limit)
    _print_plan(benchmark, manifest, len(rows), most, settings.settings["max_new_tokens"])
    if dry_run:
        return None
    with (
        closing(open_workers(request.workers, settings, request.in_flight)) as workers,
        closing(RunFolder(request.out, manifest)) as folder,
    ):
        find_questions(benchmark, {id for id, _ in folder.done})  # or a stray result would be found at the end
        folder.drop_failed()
        held = {*asked(benchmark, manifest, folder.done)}
        before = (result for result in folder.results() if (result.id, result.repeat) in held)
        with shown(before, len(rows) * request.repeats) as show:
            run(benchmark, folder, workers, rows, traces=request.traces, on_result=show)
        return _finish(benchmark, folder, manifest)


def score_answers(
    answers: Path, benchmark: str | None, data: Path | None, rules: str | None, grammar: str, partial: bool
) -> dict[str, Any]:
    """Score a run folder again in place, or the texts of a file, and return the summary.

    Args:
        rules: None are those that the run was scored by last, and for texts those of the benchmark.

    Raises:
        ValueError: naming the argument that is wrong. Nothing is changed then.
    """
    if answers.is_dir():
        check_writable(answers, "answers")
        opened, manifest = open_run(answers, benchmark, data)
        manifest |= {"rules": _check_rules(opened, rules or manifest["rules"])}
        with closing(RunFolder(answers, manifest)) as folder:
            _check_ended(opened, folder)
            return _finish(opened, folder, manifest)
    if benchmark is None:
        raise ValueError("benchmark must be named to score the texts of a file, got None")
    opened = open_benchmark(benchmark, data, allow_partial=partial)
    chosen = _check_rules(opened, rules)
    texts = read_texts(answers, named_grammar(grammar))
    answered = with_questions(opened, texts, str(answers))
    check_groups(opened, answered, str(answers))
    scored = [*score_all(opened, answered, chosen)]
    protocol = {"benchmark": opened.name, "dataset": vars(opened.dataset), "rules": chosen, "texts": str(answers)}
    return summarise(opened, scored, protocol)


def judge_answers(run: Path, data: Path | None, grade: Callable[[list[Scored], Path], None]) -> dict[str, Any]:
    """Let ``grade`` write the grades of a run's answers to a file in its folder, and return the new summary.

    Raises:
        ValueError: naming the argument that is wrong.
    """
    check_writable(run, "run")
    opened, manifest = open_run(run, None, data)
    with closing(RunFolder(run, manifest)) as folder:
        _check_ended(opened, folder)
        answered = with_questions(opened, folder.results(), str(run))
        grade([each for each in answered if each.result.outcome != "failed"], run / GRADES)
        return _finish(opened, folder, manifest)


def open_run(run: Path, benchmark: str | None, data: Path | None) -> tuple[Benchmark, dict[str, Any]]:
    """Open the benchmark of a run folder, and return it with the run's protocol.

    Args:
        benchmark: its name, which must be that of the run; None is that.
        data: where its file is now; None is where the run found it.

    Raises:
        ValueError: the folder has no run, or the file is not the one that was evaluated.
    """
    manifest = read_manifest(run)
    if manifest is None:
        raise ValueError(f"answers must be a run folder or a .jsonl file, got {str(run)!r}, which has no {PROTOCOL}")
    if benchmark is not None and benchmark_class(benchmark).name != manifest["benchmark"]:
        raise ValueError(f"benchmark must be that of the run, {manifest['benchmark']!r}, got {benchmark!r}")
    opened = open_evaluated(manifest, data, "the run")
    return opened, manifest | {"dataset": vars(opened.dataset)}


def _check_ended(benchmark: Benchmark, folder: RunFolder) -> None:
    """Raise ``ValueError`` if a run lacks answers. Those that are quick to give would count too much."""
    todo = len(selected(benchmark, folder.manifest.get("limit"))) * (folder.manifest.get("repeats") or 1)
    found = sum(1 for _ in asked(benchmark, folder.manifest, folder.done))
    if found < todo:
        raise ValueError(
            f"answers must be a run that has ended, got {found:,} of {todo:,} results in {str(folder.path)!r}; "
            "`llava-cot evaluate` goes on with it"
        )


def _finish(benchmark: Benchmark, folder: RunFolder, manifest: dict[str, Any]) -> dict[str, Any]:
    """Give every result the verdict of the rules in ``manifest``, and write the results, the summary and the report.

    A run may have had a higher limit or more repeats before. The summary is of what ``manifest`` asks.
    """
    rules = manifest["rules"]
    before = [*folder.results()]
    scored = [*score_all(benchmark, with_questions(benchmark, before, str(folder.path)), rules)]
    if (folder.path / GRADES).exists():
        scored = [*with_grades(scored, read_grades(folder.path / GRADES))]
    after = [each.result for each in scored]
    if after != before:
        folder.replace(after)
    write_manifest(folder.path, manifest)
    wanted = {*asked(benchmark, manifest, folder.done)}
    scored = [each for each in scored if (each.result.id, each.result.repeat) in wanted]
    summary = summarise(benchmark, scored, manifest)
    with replacing(folder.path / SUMMARY) as file:
        file.write(json.dumps(summary, indent=1) + "\n")
    write_report(folder.path, summary, scored)
    return summary


def _check_search(request: Request) -> int | None:
    """Check the search and its settings, and return the most generations for one question."""
    grammar = named_grammar(request.grammar) if request.grammar else LLAVA_COT
    given = dict(request.model_settings().settings)
    if request.scorer is not None:
        check_scorer_name(request.scorer)
        if "scorer" not in settings_of(request.search):
            raise ValueError(f"scorer is not supported by search={request.search!r}, got {request.scorer!r}")
    return make_plan(request.search, given, grammar).config.max_generations


def _check_rules(benchmark: Benchmark, rules: str | None) -> str:
    known = [benchmark.own_rules] if benchmark.own_rules else [*RULES]
    if rules is not None and rules not in known:
        raise ValueError(f"rules must be one of {known} for {benchmark.name}, got {rules!r}")
    return rules or benchmark.default_rules


def _print_plan(benchmark: Benchmark, manifest: dict[str, Any], rows: int, most: int | None, tokens: int) -> None:
    answers = rows * manifest["repeats"]
    file = benchmark.dataset.path or benchmark.dataset.variant
    times = "once" if manifest["repeats"] == 1 else f"{manifest['repeats']} times"
    lines = [
        f"{benchmark.title}: {rows:,} of {len(benchmark):,} questions from {file}, each asked {times}",
        f"asked as {manifest['preset']}, scored by {manifest['rules']}",
        f"{manifest['model']} with {manifest['search']}, seed {manifest['seed']}",
        "at most "
        + (f"{answers * most:,} generations" if most else f"{answers:,} answers in any number of generations")
        + f", each of at most {tokens:,} tokens",
    ]
    print("\n".join(lines), file=sys.stderr)
