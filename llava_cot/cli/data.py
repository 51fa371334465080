"""Commands that make training data: validate, annotate."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()


@app.command()
def validate(
    data: Annotated[Path, typer.Argument(help='A .jsonl of {"id", "image", "conversations"}, as LLaVA-CoT-100k\'s.')],
    images: Annotated[Path, typer.Option(help="The folder that the paths of images are relative to.")],
    clean: Annotated[Path, typer.Option(help="Write the good lines to this file, as they are.")],
    quarantine: Annotated[Path, typer.Option(help="Write {line, reason, raw} of each bad line to this file.")],
    report: Annotated[Path | None, typer.Option(help="Write the counts as JSON to this file.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes that check lines and decode images.")] = 1,
    decode: Annotated[bool, typer.Option(help="Decode every image, or only look whether it is there.")] = True,
    max_aspect: Annotated[float, typer.Option(min=1, help="Of an image: longer over shorter side.")] = 50.0,
    allow_text_only: Annotated[bool, typer.Option("--allow-text-only", help="A row may be without an image.")] = False,
    test_images: Annotated[
        Path | None, typer.Option(help="A folder of a benchmark's images: rows about one of them are bad.")
    ] = None,
) -> None:
    """Part training data into good lines and bad ones; exit with 1 if any is bad."""
    import signal
    import sys

    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from llava_cot.data.checks import LineChecks
    from llava_cot.data.images import ImageChecks, image_hashes
    from llava_cot.data.validate import validate_file

    size = data.stat().st_size
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # half a file is cleared away
    try:
        with Progress(TextColumn("{task.description}"), *columns, console=console) as progress:
            task = progress.add_task("hashing test images" if test_images else "validating", total=None)
            hashes = image_hashes(test_images, workers) if test_images else frozenset()
            files = ImageChecks(images, max_aspect=max_aspect, decode=decode, forbidden=hashes)
            progress.update(task, description="validating", total=size)
            found = validate_file(
                data,
                clean,
                quarantine,
                LineChecks(files, allow_text_only),
                report=report,
                workers=workers,
                advance=lambda count: progress.advance(task, count),
            )
    finally:
        signal.signal(signal.SIGTERM, before)
    console.print(found.to_table())
    if found.total.quarantined:
        raise typer.Exit(1)


@app.command()
def annotate(
    questions: Annotated[Path, typer.Argument(help='A .jsonl of {"id", "image", "question", "answer"} or of rows.')],
    out: Annotated[Path, typer.Argument(help="The .jsonl to append to; what it has already is not asked again.")],
    model: Annotated[str, typer.Option(help="That writes and judges, as the endpoint names it.")],
    base_url: Annotated[str | None, typer.Option(help="Of an OpenAI-compatible endpoint, e.g. with /v1.")] = None,
    images: Annotated[
        Path | None, typer.Option(help="The folder that the paths of images are relative to; that of QUESTIONS if not.")
    ] = None,
    rejects: Annotated[
        Path | None, typer.Option(help="Append rejected ids and why; OUT's name .rejects.jsonl.")
    ] = None,
    retry_rejects: Annotated[bool, typer.Option("--retry-rejects", help="Ask what was rejected again.")] = False,
    limit: Annotated[int | None, typer.Option(min=0, help="Conversations of this run.")] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Conversations at a time.")] = 8,
    rpm: Annotated[float | None, typer.Option(help="Requests a minute, evenly spaced.")] = None,
    tpm: Annotated[float | None, typer.Option(help="Tokens a minute, evenly spaced.")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds for one request.")] = 120.0,
    max_retries: Annotated[int, typer.Option(min=0, help="Of one request, after what may pass.")] = 8,
    attempts: Annotated[int, typer.Option(min=1, help="Texts asked for a turn until one is valid.")] = 2,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of one reply.")] = 2048,
    temperature: Annotated[float | None, typer.Option(min=0, help="The endpoint's own if not given.")] = None,
    seed: Annotated[int | None, typer.Option(help="Sent with each request if given.")] = None,
    price_in: Annotated[float | None, typer.Option(help="USD per million prompt tokens.")] = None,
    price_out: Annotated[float | None, typer.Option(help="USD per million completion tokens.")] = None,
    max_cost: Annotated[float | None, typer.Option(help="USD of all runs into OUT; stop before more is spent.")] = None,
    image_tokens: Annotated[int, typer.Option(min=0, help="What an image counts for in estimates.")] = 1000,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only estimate requests, tokens and cost.")] = False,
) -> None:
    """Write four-stage answers to questions whose answers are known, by a model behind an endpoint."""
    from llava_cot.data.annotation.cost import Prices
    from llava_cot.data.annotation.progress import progress_bar, summary
    from llava_cot.data.annotation.run import Settings, annotate_file, estimate_file

    if (price_in is None) != (price_out is None):
        raise ValueError(f"price_in and price_out must be given together, got {price_in} and {price_out}")
    prices = None if price_in is None or price_out is None else Prices(price_in, price_out)
    settings = Settings(
        model,
        base_url,
        images,
        concurrency=concurrency,
        rpm=rpm,
        tpm=tpm,
        timeout=timeout,
        max_retries=max_retries,
        attempts=attempts,
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        image_tokens=image_tokens,
        prices=prices,
        max_cost=max_cost,
        limit=limit,
        retry_rejects=retry_rejects,
    )
    if dry_run:
        print(estimate_file(questions, out, rejects, settings))
        return
    with progress_bar() as show:
        outcome = annotate_file(questions, out, rejects, settings, show=show)
    print(summary(outcome))
    if outcome.signal is not None:
        raise typer.Exit(128 + outcome.signal)
