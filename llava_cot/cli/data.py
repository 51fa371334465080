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
