"""The command that replays a trace."""

from pathlib import Path
from typing import Annotated

import typer

from llava_cot.cli.search import Quantize

app = typer.Typer()


@app.command()
def replay(
    *,
    trace: Annotated[Path, typer.Argument(help="One trace as JSON.")],
    model: Annotated[
        str | None,
        typer.Option(help="A model folder or a hub name; by default that of the trace.", show_default=False),
    ] = None,
    image: Annotated[
        list[str] | None,
        typer.Option(help="An image of the question, in their order. May be repeated.", show_default=False),
    ] = None,
    system: Annotated[str | None, typer.Option(help="The system prompt, if the search had one.")] = None,
    tolerance: Annotated[float, typer.Option(min=0, help="The largest difference of a log-prob, in nats.")] = 1e-4,
    device: Annotated[str | None, typer.Option(help="The device of the model, e.g. cuda; by default the CPU.")] = None,
    quantize: Quantize = None,
) -> None:
    """Force a trace's tokens through the engine and compare every log-prob. Exit with 1 if one differs."""
    from llava_cot.image import check_image
    from llava_cot.replay import check_replay
    from llava_cot.replay import replay as replayed
    from llava_cot.trace import read_trace

    # All that needs no weights is checked before they are loaded.
    record = read_trace(trace)
    images = image or ([str(trace.parent / record.image)] if record.image else [])
    for each in images:
        check_image(each)
    check_replay(record.trace, images, tolerance)
    name = model or record.trace.data["model"]
    if not name:
        raise ValueError("model must be given, since the trace names none, got none")

    from transformers.utils import logging

    from llava_cot.generator import SwiresGenerator

    logging.disable_progress_bar()
    generator = SwiresGenerator.from_pretrained(
        name,
        device=device,
        quantize=quantize,
        bos=record.trace.data["bos"],  # type: ignore[arg-type]  # it is checked there
        grammar=record.trace.grammar,
        system=system,
    )
    found = replayed(generator, record.trace, images, tolerance=tolerance)
    for difference in found.differences:
        print(difference)
    if found.skipped:
        print(f"candidates that were skipped, since their tokens or log-probs are not known: {found.skipped}")
    print(found)
    raise typer.Exit(0 if found.agrees else 1)
