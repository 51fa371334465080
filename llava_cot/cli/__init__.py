"""The ``llava-cot`` command. It turns arguments into calls; the work of each command is done elsewhere."""

import sys
from io import TextIOWrapper

import typer
from rich.console import Console
from rich.markup import escape

from llava_cot.cli import check, data, evaluate, plan, replay, search, serve, train

HELP = "Vision-language models that reason in stages: search, serving, data, training."

# The extra that brings a package
EXTRAS = {
    **dict.fromkeys(("torch", "transformers"), "local"),
    **dict.fromkeys(("fastapi", "starlette", "sse_starlette", "uvicorn", "h11", "prometheus_client"), "serve"),
}

app = typer.Typer(help=HELP, add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
for part in (search, replay, serve, plan, data, train, check, evaluate):
    app.add_typer(part.app)


def main() -> None:
    """Run the command. Bad input and kernels that are not built print one line and exit with 2, without a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # an ASCII or Latin-1 terminal shows "?" for what it lacks
            stream.reconfigure(errors="replace")
    try:
        app()
    except (ValueError, TypeError, OSError, ImportError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name in EXTRAS:
            error = ImportError(f"this command needs {error.name}: pip install 'llava-cot[{EXTRAS[error.name]}]'")
        elif isinstance(error, ImportError) and error.name != "llava_cot_kernels._C":
            raise
        Console(stderr=True).print(f"[red]error:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
        sys.exit(2)
