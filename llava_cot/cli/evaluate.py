"""The commands around benchmarks: evaluate, score, compare and tables."""

import json
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llava_cot.cli.search import Model

if TYPE_CHECKING:
    from llava_cot.evaluate.result import Scored

app = typer.Typer()

BenchmarkName = Annotated[str, typer.Argument(help="The benchmark, as docs/evaluation.md lists them.")]
Json = Annotated[bool, typer.Option("--json", help="Print the summary as one JSON object.")]
Partial = Annotated[bool, typer.Option("--partial", help="Accept a file with fewer rows than were published.")]


@app.command()
def evaluate(
    benchmark: BenchmarkName,
    out: Annotated[Path, typer.Option(help="The run folder. A run that was interrupted goes on there.")],
    data: Annotated[
        Path | None,
        typer.Option(help="The benchmark's file: a TSV of VLMEvalKit, parquet or jsonl."),
    ] = None,
    model: Model = "tiny",
    search: Annotated[str, typer.Option(help="The search, as for answer, e.g. greedy or swires:published.")] = "greedy",
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="NAME=VALUE", help="A setting of the search. The value is JSON or text. May be repeated."
        ),
    ] = None,
    scorer: Annotated[
        str | None,
        typer.Option(help="The scorer: a name, verifier (of the world alone) or reward:FOLDER, a reward model."),
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="How questions are asked; docs/evaluation.md lists the presets.")
    ] = None,
    rules: Annotated[str | None, typer.Option(help="How answers are scored: compat, strict or math.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Ask the first questions alone.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="How often each question is asked, with other seeds.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="The seed of everything random.")] = 0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The most tokens of a whole answer.")] = 2048,
    grammar: Annotated[str | None, typer.Option(help="The stages that the model writes, e.g. think-answer.")] = None,
    system: Annotated[str | None, typer.Option(help="The system prompt.")] = None,
    device: Annotated[str | None, typer.Option(help="The device of the model, e.g. cuda; by default the CPU.")] = None,
    dtype: Annotated[str, typer.Option(help="The dtype of the model; auto is that of its files.")] = "auto",
    quantize: Annotated[str | None, typer.Option(help="Quantise the weights: int8, int4, float8 or nf4.")] = None,
    workers: Annotated[
        str, typer.Option(help="local, or ray:N for N actors with one GPU each (or a CPU without GPUs).")
    ] = "local",
    in_flight: Annotated[int, typer.Option(min=1, help="The most questions that a worker answers at once.")] = 64,
    traces: Annotated[str, typer.Option(help="Whose traces are kept: wrong, all or none.")] = "wrong",
    partial: Partial = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    json: Json = False,
) -> None:
    """Run a benchmark and score it. The same command goes on where it was interrupted, and tries again what failed."""
    from llava_cot.evaluate.command import Request, evaluate_benchmark

    if traces not in ("wrong", "all", "none"):
        raise ValueError(f"traces must be wrong, all or none, got {traces!r}")
    request = Request(
        benchmark=benchmark, data=data, out=out, model=model, search=search, settings=_settings(settings or []),
        scorer=scorer, preset=preset, rules=rules, limit=limit, repeats=repeats, seed=seed,
        max_new_tokens=max_new_tokens, grammar=grammar, system=system, device=device, dtype=dtype, quantize=quantize,
        workers=workers, in_flight=in_flight, traces=traces, partial=partial,
    )  # fmt: skip
    # A run that is told to stop closes its file and exits; what it has written is whole.
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        found = evaluate_benchmark(request, dry_run=dry_run)
    except (KeyboardInterrupt, SystemExit):
        print("stopped: the same command goes on with what is missing", file=sys.stderr)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    if found is not None:
        _show(found, json)
        print(f"the report is {out / 'report.html'}", file=sys.stderr)


@app.command()
def score(
    answers: Annotated[Path, typer.Argument(help='A run folder, or a .jsonl of {"id", "text"}.')],
    benchmark: Annotated[str | None, typer.Option(help="The benchmark; by default that of the run.")] = None,
    data: Annotated[Path | None, typer.Option(help="The benchmark's file; by default that of the run.")] = None,
    rules: Annotated[
        str | None,
        typer.Option(help="compat, strict or math; by default those of the run, and for a .jsonl the benchmark's."),
    ] = None,
    grammar: Annotated[str, typer.Option(help="The stages that the texts of a .jsonl have.")] = "llava-cot",
    partial: Partial = False,
    json: Json = False,
) -> None:
    """Score answers again by other rules, without a model. A run folder keeps the new verdicts and summary."""
    from llava_cot.evaluate.command import score_answers

    _show(score_answers(answers, benchmark, data, rules, grammar, partial), json)


@app.command()
def judge(
    run: Annotated[Path, typer.Argument(help="The folder of a run whose answers are graded, such as of MMVet.")],
    model: Annotated[str | None, typer.Option(help="The model that grades, as the endpoint names it.")] = None,
    base_url: Annotated[str | None, typer.Option(help="The URL of an OpenAI-compatible endpoint.")] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="The number of requests at a time.")] = 8,
    export: Annotated[
        Path | None, typer.Option(help="Write the answers to this file, to be graded elsewhere, and ask no model.")
    ] = None,
    grades: Annotated[
        Path | None, typer.Option(help="Take the grades of this file: an export with a judge and a grade in each line.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="The benchmark's file; by default that of the run.")] = None,
    json: Json = False,
) -> None:
    """Grade the answers of a run by a judge, whose name stands beside the number. The same command goes on."""
    from llava_cot.evaluate.command import judge_answers
    from llava_cot.evaluate.judge import JudgeSettings, export_for_judging, grade_file, take_grades

    ways = [name for name, value in (("model", model), ("export", export), ("grades", grades)) if value is not None]
    if len(ways) != 1:
        raise ValueError(f"one of model, export and grades must be given, got {ways or 'none'}")

    def grade(answered: "list[Scored]", path: Path) -> None:
        if export is not None:
            print(f"{export_for_judging(answered, export)} answers", file=sys.stderr)
        elif grades is not None:
            take_grades(answered, grades, path)
        else:
            grade_file(answered, path, JudgeSettings(model or "", base_url, concurrency))

    _show(judge_answers(run, data, grade), json)


@app.command()
def predictions(
    run: Annotated[Path, typer.Argument(help="The folder of a run that answered every row of the benchmark.")],
    out: Annotated[Path, typer.Argument(help="The file to write: a .tsv for VLMEvalKit, a .json for lmms-eval.")],
    to: Annotated[str, typer.Option(help="Whose scorer is to read it: vlmevalkit or lmms-eval.")],
    task: Annotated[str | None, typer.Option(help="For lmms-eval: the name of its task.")] = None,
    repeat: Annotated[int, typer.Option(min=0, help="Which of the repeats.")] = 0,
    data: Annotated[Path | None, typer.Option(help="The benchmark's file; by default that of the run.")] = None,
) -> None:
    """Write the answers of a run as predictions, which another harness scores without a model."""
    from llava_cot.evaluate.command import open_run
    from llava_cot.evaluate.export import write_lmms_eval_log, write_vlmevalkit_table
    from llava_cot.evaluate.folder import read_run

    benchmark, protocol = open_run(run, None, data)
    results = read_run(run).results
    if to == "vlmevalkit":
        count = write_vlmevalkit_table(benchmark, results, out, repeat=repeat)
    elif to == "lmms-eval":
        name = task or benchmark.name
        count = write_lmms_eval_log(benchmark, results, out, task=name, model=protocol["model"], repeat=repeat)
    else:
        raise ValueError(f"to must be vlmevalkit or lmms-eval, got {to!r}")
    print(f"{count} predictions")


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(help="The folder of a run.")],
    b: Annotated[Path, typer.Argument(help="The folder of another run on the same questions.")],
    data: Annotated[Path | None, typer.Option(help="The benchmark's file; by default where run A found it.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write the comparison as a page to this file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the comparison as one JSON object.")] = False,
) -> None:
    """Compare two runs on the same questions, in pairs: the difference with its interval, and what flipped."""
    from llava_cot.atomic import check_output, replacing
    from llava_cot.evaluate.compare import compare_runs
    from llava_cot.evaluate.folder import read_run
    from llava_cot.evaluate.pages.compare_page import to_html, to_text

    if html is not None:
        check_output(html, "html")
    found = compare_runs(read_run(a), read_run(b), data)
    if html is not None:
        with replacing(html, "backslashreplace") as file:
            file.write(to_html(found))
    print(json.dumps(found, indent=1) if as_json else to_text(found), end="\n" if as_json else "")


@app.command()
def tables(
    runs: Annotated[list[Path] | None, typer.Argument(help="Folders of runs; without any, the published rows.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write the tables as a page to this file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the tables as one JSON object.")] = False,
) -> None:
    """Lay out runs as the paper's main table and its two ablation tables, beside the published rows, in Markdown."""
    from llava_cot.atomic import check_output, replacing
    from llava_cot.evaluate.pages.tables_page import to_html, to_markdown
    from llava_cot.evaluate.tables import make_tables, read_entry

    if html is not None:
        check_output(html, "html")
    found = make_tables([read_entry(run) for run in runs or []])
    if html is not None:
        with replacing(html, "backslashreplace") as file:
            file.write(to_html(found))
    print(json.dumps(found, indent=1) if as_json else to_markdown(found), end="\n" if as_json else "")


def _settings(given: list[str]) -> dict[str, Any]:
    """Return the settings that NAME=VALUE texts name. A value that is not JSON is a text."""
    settings: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"set must be NAME=VALUE, got {text!r}")
        try:
            settings[name] = json.loads(value)
        except (ValueError, RecursionError):
            settings[name] = value
    return settings


def _show(summary: dict[str, Any], as_json: bool) -> None:
    from llava_cot.evaluate.summary import to_text

    print(json.dumps(summary, indent=1) if as_json else to_text(summary))
