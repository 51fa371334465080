"""The commands that make training data: validate and annotate."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()


@app.command()
def validate(
    data: Annotated[Path, typer.Argument(help='A .jsonl of {"id", "image", "conversations"}, as in LLaVA-CoT-100k.')],
    images: Annotated[Path, typer.Option(help="The folder that image paths are relative to.")],
    clean: Annotated[Path, typer.Option(help="Write the good lines, unchanged, to this file.")],
    quarantine: Annotated[Path, typer.Option(help="Write {line, reason, raw} of each bad line to this file.")],
    report: Annotated[Path | None, typer.Option(help="Write the counts as JSON to this file.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="The processes that check lines and decode images.")] = 1,
    decode: Annotated[bool, typer.Option(help="Decode every image, or only check that its file exists.")] = True,
    max_aspect: Annotated[
        float, typer.Option(min=1, help="The largest ratio of an image's longer to its shorter side.")
    ] = 50.0,
    allow_text_only: Annotated[bool, typer.Option("--allow-text-only", help="Accept rows without an image.")] = False,
    test_images: Annotated[
        Path | None, typer.Option(help="A folder of benchmark images. A row about one of them is bad.")
    ] = None,
) -> None:
    """Split training data into good lines and bad ones. Exits with 1 if any is bad."""
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
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # removes unfinished files
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
    questions: Annotated[
        Path, typer.Argument(help='A .jsonl of {"id", "image", "question", "answer"}, or of rows as in LLaVA-CoT-100k.')
    ],
    out: Annotated[Path, typer.Argument(help="The .jsonl to append to. Questions that it already has are skipped.")],
    model: Annotated[str, typer.Option(help="The model that writes and judges, as the endpoint names it.")],
    base_url: Annotated[
        str | None, typer.Option(help="The URL of an OpenAI-compatible endpoint, with /v1 if it has that.")
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="The folder that image paths are relative to; by default that of QUESTIONS.")
    ] = None,
    rejects: Annotated[
        Path | None,
        typer.Option(help="Append rejected ids and reasons to this file; by default OUT ending in .rejects.jsonl."),
    ] = None,
    retry_rejects: Annotated[bool, typer.Option("--retry-rejects", help="Ask the rejected questions again.")] = False,
    limit: Annotated[int | None, typer.Option(min=0, help="The most conversations of this run.")] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="The number of conversations at a time.")] = 8,
    rpm: Annotated[float | None, typer.Option(help="The most requests per minute, evenly spaced.")] = None,
    tpm: Annotated[float | None, typer.Option(help="The most tokens per minute, evenly spaced.")] = None,
    timeout: Annotated[float, typer.Option(help="The seconds that one request may take.")] = 120.0,
    max_retries: Annotated[int, typer.Option(min=0, help="The most retries of a request after temporary errors.")] = 8,
    attempts: Annotated[int, typer.Option(min=1, help="The most texts requested per turn until one is valid.")] = 2,
    max_tokens: Annotated[int, typer.Option(min=1, help="The most tokens of one reply.")] = 2048,
    temperature: Annotated[
        float | None, typer.Option(min=0, help="The sampling temperature; by default the endpoint's own.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="The seed that is sent with each request; by default none.")] = None,
    price_in: Annotated[float | None, typer.Option(help="USD per million prompt tokens.")] = None,
    price_out: Annotated[float | None, typer.Option(help="USD per million completion tokens.")] = None,
    max_cost: Annotated[float | None, typer.Option(help="The most USD that all runs into OUT may spend.")] = None,
    image_tokens: Annotated[int, typer.Option(min=0, help="The tokens of an image in estimates.")] = 1000,
    workers: Annotated[
        str | None,
        typer.Option(help="Run MODEL here instead of asking an endpoint: local, or ray:N for N actors."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="The device of workers, e.g. cuda; by default the CPU.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only estimate requests, tokens and cost.")] = False,
) -> None:
    """Let a model behind an endpoint, or on workers, write four-stage answers to questions whose answers are known."""
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
    chat = None
    if workers is not None:
        from llava_cot.workers.chat import open_chat
        from llava_cot.workers.task import ModelSettings

        if base_url is not None:
            raise ValueError(f"base_url must not be given with workers={workers!r}, got {base_url!r}")
        sampling = {} if temperature is None else {"temperature": temperature}
        decoding = {"max_new_tokens": max_tokens, **sampling}
        chat = open_chat(workers, ModelSettings(model, "sample", decoding, device=device), concurrency)
    with progress_bar() as show:
        outcome = annotate_file(questions, out, rejects, settings, chat=chat, show=show)
    print(summary(outcome))
    if outcome.signal is not None:
        raise typer.Exit(128 + outcome.signal)
