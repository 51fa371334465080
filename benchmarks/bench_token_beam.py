"""Compare token beam search on the engine with ``model.generate(num_beams=k)``: same model, same sequences, one run.

``python benchmarks/bench_token_beam.py`` uses the random Mllama of bench_search with about 100M parameters. With
``--device cuda`` it has the shape of the 11B model. The sequences must be the same; in bfloat16 the share of equal
tokens is reported. Random weights end no answer, so every beam runs to the token limit. transformers keeps a whole
cache for each beam, including the keys and values of the image, and copies all of it at every step. The engine forks by
page table and stores the image once.

Each way runs once before it is timed, and the seconds of that first run are reported too. The engine runs the very same
search, so it compiles and captures everything that it needs. transformers runs 2 tokens. A way that fails leaves its
error in its row.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from bench_search import (
    PAGE_SIZE,
    PROMPT_PAGES,
    PROMPT_TOKENS,
    TWO_BY_ONE_TILES,
    Ways,
    agreement,
    build_model,
    environment,
    pages_drawn,
    peak_memory,
    random_inputs,
    used_mib,
)
from timing import Results, check_device
from transformers import AutoProcessor

from llava_cot import EngineConfig, SwiresGenerator, tiny_path


def run_engine(generator: SwiresGenerator, inputs: dict, num_beams: int, new_tokens: int) -> tuple[dict, list[int]]:
    engine = generator.engine
    engine.runner.peak_pages = 0
    settings = {"num_beams": num_beams, "max_new_tokens": new_tokens}
    with peak_memory(generator.model) as memory:
        start = time.perf_counter()
        out = generator.generate(**inputs, search="token_beam", return_dict_in_generate=True, **settings)
        seconds = time.perf_counter() - start
    assert engine.pages_in_use == 0
    peak = memory.mib + used_mib(generator, [inputs])
    cache = engine.view.kv_cache  # [2, layers, pages, ...]
    text = engine.runner.peak_pages * cache[:, :, 0].numel() * cache.element_size()
    steps = out.answers[0].usage.steps
    return figures(seconds, steps, text + image_bytes(generator.model), peak, new_tokens), out.answers[0].tokens


def run_transformers(model, inputs: dict, num_beams: int, new_tokens: int) -> tuple[dict, list[int]]:
    steps = 0

    def count(*_):
        nonlocal steps
        steps += 1

    hook = model.model.language_model.register_forward_hook(count)
    with peak_memory(model) as memory:
        start = time.perf_counter()
        ids = model.generate(**inputs, do_sample=False, num_beams=num_beams, max_new_tokens=new_tokens)
        seconds = time.perf_counter() - start
    hook.remove()
    config = model.config.text_config
    text_layers = config.num_hidden_layers - len(config.cross_attention_layers)
    head_dim = config.hidden_size // config.num_attention_heads
    per_token = 2 * text_layers * config.num_key_value_heads * head_dim * model.dtype.itemsize
    kv_bytes = num_beams * (per_token * (ids.shape[1] - 1) + image_bytes(model, padded=True))
    return figures(seconds, steps, kv_bytes, memory.mib, new_tokens), ids[0, inputs["input_ids"].shape[1] :].tolist()


def image_bytes(model, padded: bool = False) -> int:
    """Return the size of the image's keys and values: of its 2 real tiles, or of all tiles as in transformers."""
    text, vision = model.config.text_config, model.config.vision_config
    tokens = (vision.max_num_tiles if padded else 2) * ((vision.image_size // vision.patch_size) ** 2 + 1)
    head_dim = text.hidden_size // text.num_attention_heads
    return 2 * len(text.cross_attention_layers) * tokens * text.num_key_value_heads * head_dim * model.dtype.itemsize


def figures(seconds: float, steps: int, kv_bytes: int, peak_mib: float, new_tokens: int) -> dict:
    return {
        "seconds": round(seconds, 3),
        "tokens_per_second": round(new_tokens / seconds, 1),
        "forward_steps": steps,
        "kv_mib": round(kv_bytes / 2**20, 1),
        "peak_mib": round(peak_mib, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--beams", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=torch.cuda.is_available(),
        help="compile the engine's decoder layers",
    )
    parser.add_argument("--json", type=Path, help="write the figures to this JSON file")
    args = parser.parse_args()
    check_device(args.device)
    torch.set_num_threads(args.threads)
    model = build_model(args.device)
    # Only the pages that are needed, so that the peer has the rest of a GPU's memory. A beam is copied before it dies.
    num_pages = PROMPT_PAGES + pages_drawn(2 * max(args.beams), args.tokens)
    engine = EngineConfig(PAGE_SIZE, num_pages, compile=args.compile)
    generator = SwiresGenerator(model, AutoProcessor.from_pretrained(tiny_path()), engine=engine)
    inputs = random_inputs(model, length=PROMPT_TOKENS, ratio_id=TWO_BY_ONE_TILES, seed=1)
    environ = environment(args.threads, args.device)
    results = Results(args.json, benchmark="bench_token_beam", **environ, new_tokens=args.tokens, compile=args.compile)
    ways = Ways(results)
    columns = ["beams", "way", "wall time", "at first", "tokens/s", "forward steps", "keys and values", "peak memory"]
    print(f"| {' | '.join([*columns, 'the same tokens'])} |\n|{' --- |' * (len(columns) + 1)}", flush=True)
    for num_beams in args.beams:
        found: dict[str, list[int]] = {}

        def ours(num_beams: int = num_beams, found: dict = found) -> dict[str, Any]:
            first, _ = run_engine(generator, inputs, num_beams, args.tokens)
            row, found["engine"] = run_engine(generator, inputs, num_beams, args.tokens)
            return {"first_seconds": first["seconds"], **row}

        def theirs(num_beams: int = num_beams, found: dict = found) -> dict[str, Any]:
            first, _ = run_transformers(model, inputs, num_beams, 2)
            row, tokens = run_transformers(model, inputs, num_beams, args.tokens)
            row["first_seconds"] = first["seconds"]
            if "engine" not in found:
                return row
            if args.device == "cpu" and tokens != found["engine"]:
                raise RuntimeError("it found other tokens, and a ratio between different searches means nothing")
            return {**row, "agreement": agreement([found["engine"]], [tokens])}

        seconds: dict[str, float] = {}
        for way, call in (("engine", ours), ("transformers", theirs)):
            if not (row := ways.run(way, call, beams=num_beams)):
                continue
            seconds[way] = row["seconds"]
            ratio = f" ({row['seconds'] / seconds['engine']:.1f}x)" if way != "engine" and "engine" in seconds else ""
            same = f"{row['agreement']:.1%}" if "agreement" in row else ""
            memory = f"{row['kv_mib']} MiB | {row['peak_mib']:.0f} MiB"
            print(
                f"| {num_beams} | {way} | {row['seconds']:.2f} s{ratio} | {row['first_seconds']:.2f} s | "
                f"{row['tokens_per_second']} | {row['forward_steps']} | {memory} | {same} |",
                flush=True,
            )
    ways.exit()


if __name__ == "__main__":
    main()
