"""The command that runs the conformance kit: check."""

from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from llava_cot.cli.search import Quantize

app = typer.Typer()


@app.command()
def check(
    model: Annotated[
        str, typer.Argument(help="A model folder or a hub name, or with --random also the name of a family.")
    ],
    random: Annotated[bool, typer.Option("--random", help="Draw new weights for the model's configuration.")] = False,
    device: Annotated[str | None, typer.Option(help="The device of the model, e.g. cuda; by default the CPU.")] = None,
    dtype: Annotated[str, typer.Option(help="The dtype of the weights; auto is that of the checkpoint.")] = "auto",
    quantize: Quantize = None,
) -> None:
    """Check that the engine gives what transformers gives for a model. Exit with 1 if it does not."""
    from llava_cot.check.kit import CHECKS
    from llava_cot.check.models import load_kit
    from llava_cot.check.text import TEXT_CHECKS

    kit = load_kit(model, random=random, device=device, dtype=dtype, quantize=quantize)
    results = kit.run([*CHECKS, *TEXT_CHECKS])
    table = Table("check", "result", "what was compared", "seconds")
    for result in results:
        mark = "[green]ok[/]" if result.passed else "[red]failed[/]"
        table.add_row(result.name, mark, escape(result.detail), f"{result.seconds:.1f}")
    Console().print(table)
    raise typer.Exit(0 if all(result.passed for result in results) else 1)
