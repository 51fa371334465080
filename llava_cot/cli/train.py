"""The commands that train: train and train-reward."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()

Config = Annotated[
    Path, typer.Argument(help="The settings of a run, e.g. configs/llava_cot_11b.yaml or tiny_reward.yaml.")
]
Overrides = Annotated[list[str] | None, typer.Argument(help="Settings to change: optimizer.lr=2e-5 output=runs/2 ...")]
Inspect = Annotated[
    int | None, typer.Option(min=1, help="Print the examples of this many rows with what is learnt, and stop.")
]


@app.command()
def train(
    config: Config,
    overrides: Overrides = None,
    inspect: Inspect = None,
    plan: Annotated[
        bool, typer.Option(help="Print the memory it takes on --gpus, without allocating it, and stop.")
    ] = False,
    gpus: Annotated[str, typer.Option(help="For --plan: the number of GPUs and the memory of each.")] = "8x80GB",
    row_tokens: Annotated[
        int | None, typer.Option(min=1, help="For --plan: the tokens of a row; by default max_row_tokens, or 2048.")
    ] = None,
    images_per_row: Annotated[
        int | None,
        typer.Option(
            min=1, help="For --plan: the images of a row; by default one, or one per 1024 tokens of a packed row."
        ),
    ] = None,
) -> None:
    """Fine-tune a model, under torchrun on several GPUs or machines. The same command resumes a run that stopped."""
    from llava_cot.train.config import load_config

    settings = load_config(config, overrides)
    if plan:
        from llava_cot.train.plan import make_plan, print_plan

        print_plan(make_plan(settings, gpus, row_tokens=row_tokens, images_per_row=images_per_row))
        return
    if inspect is not None:
        from llava_cot.train.inspect import print_examples

        print_examples(settings, inspect)
        return
    from llava_cot.train.trainer import train

    train(settings)


@app.command()
def train_reward(config: Config, overrides: Overrides = None, inspect: Inspect = None) -> None:
    """Train a stage reward model on `llava-cot export --format steps`. The same as train with objective=reward."""
    train(config, [*(overrides or ()), "objective=reward"], inspect)
