"""Commands that make training data: validate, annotate."""

import typer

app = typer.Typer()
