"""Commands that train: train, train-reward."""

import typer

app = typer.Typer()
