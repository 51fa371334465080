"""The command that serves a model."""

from pathlib import Path
from typing import Annotated

import typer

from llava_cot.cli.search import Model, Quantize

app = typer.Typer()


@app.command()
def serve(
    *,
    model: Model = "tiny",
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port to listen on; 0 takes a free one.")] = 8000,
    name: Annotated[
        str | None, typer.Option(help="The id of the model; by default the name of its folder.", show_default=False)
    ] = None,
    search: Annotated[
        str, typer.Option(help="The search by which the model answers unless another is asked for.")
    ] = "swires",
    scorer: Annotated[
        str | None, typer.Option(help="The scorer of searches: a name, or reward:FOLDER, a reward model.")
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="A file of API keys, one in a line. LLAVA_COT_API_KEY may hold them instead.")
    ] = None,
    allow_no_key: Annotated[
        bool, typer.Option("--allow-no-key", help="Listen on other than loopback addresses without an API key.")
    ] = False,
    allow_image_host: Annotated[
        list[str] | None,
        typer.Option(help="Fetch images by https from this host. May be repeated; by default none are fetched."),
    ] = None,
    limits: Annotated[
        list[str] | None,
        typer.Option("--limit", metavar="NAME=VALUE", help="A limit, as docs/serving.md lists them. May be repeated."),
    ] = None,
    drain: Annotated[float, typer.Option(min=0, help="Seconds that running requests have after SIGTERM.")] = 30.0,
    grammar: Annotated[str | None, typer.Option(help="The stages that the model writes, e.g. think-answer.")] = None,
    system: Annotated[str | None, typer.Option(help="The system prompt.")] = None,
    device: Annotated[str | None, typer.Option(help="The device of the model, e.g. cuda; by default the CPU.")] = None,
    dtype: Annotated[str, typer.Option(help="The dtype of the model; auto is that of its files.")] = "auto",
    quantize: Quantize = None,
    num_pages: Annotated[int | None, typer.Option(min=1, help="The pages of the KV cache.", show_default=False)] = None,
) -> None:
    """Serve a model over an OpenAI-compatible API, with searches as models and a page at / that shows them live."""
    from llava_cot.serve.command import ServeSettings, run

    given = {key: value for key, value in locals().items() if key not in ("ServeSettings", "run")}
    given |= {"allow_image_hosts": tuple(given.pop("allow_image_host") or ()), "limits": tuple(limits or ())}
    run(ServeSettings(**given))
