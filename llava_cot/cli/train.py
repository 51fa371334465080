"""Commands that train: train."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="The run's settings, e.g. configs/llava_cot_11b.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings that differ: optimizer.lr=2e-5 output=runs/2 ...")
    ] = None,
    inspect: Annotated[
        int | None, typer.Option(min=1, help="Print so many examples with what is learnt of them, and stop.")
    ] = None,
) -> None:
    """Fine-tune a model; under torchrun on several GPUs or machines. The same command goes on after a stop."""
    from llava_cot.train.config import load_config

    settings = load_config(config, overrides)
    if inspect is not None:
        from llava_cot.train.inspect import print_examples

        print_examples(settings, inspect)
        return
    from llava_cot.train.trainer import train

    train(settings)
