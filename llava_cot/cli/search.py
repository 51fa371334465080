"""The commands around searches: answer, demo, report and export."""

import os
import random
import sys
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from llava_cot.atomic import check_output, replacing
from llava_cot.bundled import BUNDLED

if TYPE_CHECKING:
    from PIL.Image import Image

    from llava_cot.answer import Answer, Finished
    from llava_cot.search.events import Candidates, Event
    from llava_cot.searcher import Searcher
    from llava_cot.stages import Grammar
    from llava_cot.trace import Trace

app = typer.Typer()

Search = Annotated[
    str,
    typer.Option(
        help="greedy, sample, best_of_n, majority, token_beam, sentence_beam, stage_beam or swires, "
        "or a preset of swires: swires:published, swires:released or swires:prose."
    ),
]
Model = Annotated[str, typer.Option(help=f"A model folder or a hub name; {' and '.join(BUNDLED)} are bundled.")]
Quantize = Annotated[
    str | None,
    typer.Option(help="Quantise the decoder's weights: int8, int4, float8 (GPUs alone) or nf4.", show_default=False),
]
Seed = Annotated[int, typer.Option(min=0, help="The seed of everything random.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="The most tokens of the whole answer.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the live view.")]
TraceFile = Annotated[
    Path | None,
    typer.Option(help="Write the search's trace to this file, as a page if it ends in .html, else as JSON."),
]


@app.command()
def answer(
    *,
    images: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="IMAGE",
            help="The images, if the question is about any: files, file: or data: URIs.",
            show_default=False,
        ),
    ] = None,
    question: Annotated[str, typer.Argument(help="The question.")],
    search: Search = "swires",
    model: Annotated[
        str | None,
        typer.Option(
            help=f"A model folder or a hub name; {' and '.join(BUNDLED)} are bundled, and tiny is the default. "
            "With --server the model there."
        ),
    ] = None,
    server: Annotated[
        str | None,
        typer.Option(
            help="Ask the model of a server instead, e.g. http://localhost:8000/v1. OPENAI_API_KEY is the key."
        ),
    ] = None,
    device: Annotated[str | None, typer.Option(help="The device of the model, e.g. cuda; by default the CPU.")] = None,
    quantize: Quantize = None,
    seed: Seed = 0,
    max_new_tokens: MaxNewTokens = 2048,
    scorer: Annotated[
        str | None, typer.Option(help="The scorer of candidates, e.g. confidence, vote or by_stage.")
    ] = None,
    grammar: Annotated[
        str | None, typer.Option(help="The stages that the model writes, e.g. think-answer; by default as it shows.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="The system prompt.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Budget: the most tokens that the whole search draws.")
    ] = None,
    max_seconds: Annotated[
        float | None, typer.Option(min=0.01, help="Budget: the most seconds that the search takes.")
    ] = None,
    json: Json = False,
    trace: TraceFile = None,
) -> None:
    """Answer a question about an image, stage by stage. It may be about several images, or about none."""
    from llava_cot.search import Budget

    settings: dict[str, Any] = {"seed": seed, "max_new_tokens": max_new_tokens}
    if scorer is not None:
        settings["scorer"] = scorer
    if max_tokens is not None or max_seconds is not None:
        settings["budget"] = Budget(generated_tokens=max_tokens, seconds=max_seconds)
    if server is None:
        generator = partial(_load, model or "tiny", device, quantize, system)
    else:
        for name, value in {"device": device, "quantize": quantize}.items():
            if value is not None:
                raise ValueError(f"{name} must not be given with server, got {value!r}")
        generator = partial(_connect, server, model, system)
    _run(images or [], question, search, generator, settings, json, trace, grammar=grammar)


@app.command()
def demo(
    search: Search = "swires",
    seed: Annotated[
        int | None, typer.Option(min=0, help="The number of the sample in the shapes world; by default a random one.")
    ] = None,
    verifier: Annotated[
        bool, typer.Option(help="Score by the bundled verifier, which sees the image better, or else by confidence.")
    ] = True,
    quantize: Quantize = None,
    json: Json = False,
    trace: TraceFile = None,
) -> None:
    """Make a new image, let the bundled tiny model answer a question about it, and show the right answer."""
    from llava_cot.data import shapes
    from llava_cot.scoring.verifier import load_verifier

    number = random.choice(shapes.TEST_SEEDS) if seed is None else seed
    sample = shapes.sample(number)
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder) / "image.png"
        sample.image.save(image)
        if not json:
            _show_image(sample.image, f"sample {number} of the shapes world")
        settings: dict[str, Any] = {"seed": 0, "max_new_tokens": 256}
        known = _settings(search) if verifier else set()
        if "scorer" in known:
            settings["scorer"] = load_verifier(lambda _: shapes.clean_view(number))
        if "cutoff" in known:
            settings["cutoff"] = 0.0  # a logit: more likely right than wrong
        conclusion = _run(
            [str(image)],
            sample.question,
            search,
            partial(_load, "tiny", None, quantize, None),
            settings,
            json,
            trace,
            sample.answer,
        )
    if not json:
        verdict = "right" if shapes.is_correct(sample, conclusion) else "wrong"
        console = Console()
        console.print(
            f"The truth is [bold]{sample.answer}[/]: the answer {escape(repr(conclusion))} is [bold]{verdict}[/]."
        )
        console.print(
            "[dim]The tiny model is a scale model with 1.5M parameters: greedily it is right seven times in ten.[/]"
        )


@app.command()
def report(
    traces: Annotated[Path, typer.Argument(help="One trace as JSON, or many in a folder or a .jsonl file.")],
    html: Annotated[
        Path | None,
        typer.Option(help="Write one trace as a page to this file, or many as pages with an index to this folder."),
    ] = None,
) -> None:
    """Show what a search did: its rounds, candidates and retraces. Of many searches, show the totals."""
    from llava_cot.report.many import read_rows, to_table, write_pages
    from llava_cot.trace import holds_many, read_trace

    if holds_many(traces):
        rows = read_rows(traces) if html is None else write_pages(traces, html)
        for row in rows:
            if error := row.error or row.failure:
                print(f"failed: {row.source}: {error}", file=sys.stderr)
        Console().print(to_table(rows))
        return
    if html is not None:
        check_output(html, "html")
    record = read_trace(traces)
    Console().print(record.trace.to_tree())
    if html is not None:
        with replacing(html) as file:
            file.write(record.trace.to_html(gold=record.gold))


@app.command()
def export(
    traces: Annotated[
        Path, typer.Argument(help='A .jsonl of {"trace": {...}, "image": "path", "gold": "..."}, or a folder.')
    ],
    out: Annotated[Path, typer.Argument(help="The .jsonl file to write.")],
    format: Annotated[str, typer.Option(help="The format: sft, preferences, unpaired, steps or groups.")],
    by: Annotated[
        str | None, typer.Option(help="Rank and label by score (the default) or by answers, which match gold or not.")
    ] = None,
    min_margin: Annotated[
        float | None, typer.Option(min=0, help="For preferences and unpaired: the least difference that counts.")
    ] = None,
    max_length_ratio: Annotated[
        float | None, typer.Option(min=1, help="For preferences: the largest ratio of the two lengths.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="The model whose processor renders text; by default that of the traces.")
    ] = None,
) -> None:
    """Make training data from traces: winners, preferences, labels, steps or groups."""
    from llava_cot.data.export import export_file

    given = {"by": by, "min_margin": min_margin, "max_length_ratio": max_length_ratio}
    settings = {key: value for key, value in given.items() if value is not None}
    print(f"{export_file(traces, out, format, model=model, **settings)} rows")


def _run(
    images: list[str],
    question: str,
    search: str,
    make: "Callable[[Grammar | None], Searcher]",
    settings: dict[str, Any],
    json: bool,
    trace: Path | None,
    gold: str | None = None,
    grammar: str | None = None,
) -> str:
    """Answer one question by what ``make`` returns for a grammar, show and write it, and return the conclusion."""
    from llava_cot.grammars import named_grammar
    from llava_cot.image import check_image, open_image
    from llava_cot.search import make_plan
    from llava_cot.stages import LLAVA_COT

    # All that needs no weights is checked before they are loaded.
    known = None if grammar is None else named_grammar(grammar)
    make_plan(search, {name: value for name, value in settings.items() if name != "seed"}, known or LLAVA_COT)
    for image in images:
        check_image(image)
    if not images and os.path.isfile(question):
        raise ValueError(f"question must be given after the images, got only the file {question!r}")
    if trace is not None:
        check_output(trace, "trace")
    from llava_cot.question import check_question

    check_question(question)
    generator = make(known)

    def write(found: "Trace") -> None:
        if trace is not None:
            is_page = trace.suffix.lower() == ".html"
            written = found.to_html(image=[*map(open_image, images)], gold=gold) if is_page else found.to_json(indent=1)
            with replacing(trace) as file:
                file.write(written + "\n")

    try:
        if json:
            result = generator.answer(images, question, search, **settings)
            print(_json(result))
        else:
            events = generator.stream(images, question, search, **settings)
            result = _watch(question, events)
    except Exception as error:
        if hasattr(error, "trace"):  # a failed search shows how far it came
            write(error.trace)
        raise
    write(result.trace)
    return result.conclusion


def _load(
    model: str, device: str | None, quantize: str | None, system: str | None, grammar: "Grammar | None"
) -> "Searcher":
    """Load a model, whose device is checked before its weights are loaded."""
    from llava_cot.generator import SwiresGenerator
    from llava_cot.loading import check_device

    if device is not None:
        check_device(device)

    from transformers.utils import logging

    logging.disable_progress_bar()
    return SwiresGenerator.from_pretrained(model, device=device, quantize=quantize, grammar=grammar, system=system)


def _connect(server: str, model: str | None, system: str | None, grammar: "Grammar | None") -> "Searcher":
    """Connect to a server."""
    from llava_cot.remote import connect

    return connect(server, model=model, grammar=grammar, system=system)


def _settings(search: str) -> set[str]:
    """Return the settings of a search, given by its name on the command line."""
    from dataclasses import fields

    from llava_cot.search import POLICIES

    policy = POLICIES.get(search.partition(":")[0])
    return {field.name for field in fields(policy[0])} if policy else set()


def _json(result: "Answer") -> str:
    import json
    from dataclasses import asdict

    stages = {name: {"text": stage.text, "outcome": stage.outcome} for name, stage in result.stages.items()}
    return json.dumps({"conclusion": result.conclusion, "stages": stages, "usage": asdict(result.usage)}, indent=1)


def _watch(question: str, events: "Iterable[Event | Finished]") -> "Answer":
    """Show the search as it happens, and return its answer."""
    from llava_cot.answer import Finished
    from llava_cot.search.events import Candidates, Retrace, StageFinal, TextDelta

    shown: list = [Panel(Text(question, style="bold"), title="question", title_align="left")]
    typed = Text()
    with Live(Group(*shown), refresh_per_second=8) as live:
        for event in events:
            if isinstance(event, Candidates):
                shown.append(_candidates(event))
            elif isinstance(event, Retrace):
                why = (
                    ""
                    if event.score is None or event.cutoff is None
                    else f" ({event.score:.3f}, the cutoff is {event.cutoff:.3f})"
                )
                shown.append(
                    Text(f"↩ {event.stage} is not good enough{why}: back to {event.to}, round {event.round}", "yellow")
                )
            elif isinstance(event, TextDelta):
                typed.append(event.text)
                shown[1:] = [typed]
            elif isinstance(event, StageFinal) and event.stage is None and not typed:
                typed.append(event.text)
            elif isinstance(event, Finished):
                shown.append(_answer(event.answer))
            live.update(Group(*shown))
    assert isinstance(event, Finished)  # every stream ends with this event
    return event.answer


def _candidates(event: "Candidates") -> Table:
    table = Table(title=f"{event.stage or 'ANSWERS'} · round {event.round}", title_justify="left", expand=True)
    for name, options in (("", {"width": 1}), ("score", {"justify": "right", "width": 8}), ("candidate", {"ratio": 1})):
        table.add_column(name, **options)
    for candidate in event.candidates:
        text = Text(" ".join(candidate.text.split()))
        style = "green" if candidate.kept else "dim"
        mark = "●" if candidate.kept else ("○" if candidate.closed else "✗")
        table.add_row(mark, f"{candidate.score:.3f}", text, style=style)
    return table


def _answer(answer: "Answer") -> Panel:
    lines = Text()
    for name, stage in answer.stages.items():
        note = "" if stage.outcome == "complete" else f" ({stage.outcome})"
        lines.append(f"{name}{note}  ", style="bold cyan").append(f"{stage.text}\n")
    usage = answer.usage
    lines.append(
        f"{usage.generated_tokens} tokens drawn, {usage.image_encodings} image encoding, "
        f"{len(answer.trace.events('retraced'))} retraces, {usage.seconds:.2f} s",
        style="dim",
    )
    return Panel(lines, title=Text(f"answer: {answer.conclusion}"), title_align="left", border_style="green")


def _show_image(image: "Image", title: str) -> None:
    """Print the image in the terminal, two pixels per character."""
    lines = Text()
    pixels: Any = image.load()
    for y in range(0, image.height, 2):
        for x in range(image.width):
            top, bottom = pixels[x, y], pixels[x, y + 1]
            lines.append("▀", style=f"rgb({top[0]},{top[1]},{top[2]}) on rgb({bottom[0]},{bottom[1]},{bottom[2]})")
        lines.append("\n")
    Console().print(lines, f"[dim]{title}[/]")
