"""The command that plans memory: plan."""

import sys
from typing import Annotated

import typer

from llava_cot.cli.search import Quantize

app = typer.Typer()


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="A folder with a config.json, or a hub name. No weights are loaded.")],
    quantize: Quantize = None,
    dtype: Annotated[
        str | None, typer.Option(help="The dtype of what is not quantised; by default that of config.json.")
    ] = None,
    candidates: Annotated[int, typer.Option(min=1, help="The candidates of the whole search.")] = 16,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="The tokens of the prompt.")] = 512,
    new_tokens: Annotated[int, typer.Option(min=1, help="The tokens of each candidate.")] = 2048,
    gpu: Annotated[str, typer.Option(help="The memory of the GPU.")] = "24GB",
) -> None:
    """Print the memory of one question on a GPU, without loading the model. Exit with 1 if it does not fit."""
    import torch
    from transformers import AutoConfig

    from llava_cot.bundled import model_path
    from llava_cot.engine.plan import memory_plan, parse_memory, print_plan
    from llava_cot.loading import check_dtype, check_name

    gpu_bytes = parse_memory(gpu)
    check_name(model)
    if dtype is not None:
        check_dtype(dtype)
    config = AutoConfig.from_pretrained(model_path(model))
    found = memory_plan(
        config,
        quantize=quantize,
        dtype=None if dtype in (None, "auto") else getattr(torch, dtype.removeprefix("torch.")),
        candidates=candidates,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
    )
    print_plan(found, gpu_bytes)
    if not found.fits(gpu_bytes):
        sys.exit(1)
