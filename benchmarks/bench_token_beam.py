"""Token beam search on the engine and by ``model.generate(num_beams=k)``: same model, same sequences, one run.

``python benchmarks/bench_token_beam.py`` runs it on bench_search's random Mllama of about 100M parameters, with
``--device cuda`` of the 11B model's shape; the sequences must be the same, in bfloat16 the share that is stands beside
them. Random weights end nothing, so every beam runs to the token limit. transformers keeps a whole cache for each beam,
the image's keys and values included, and gathers all of it anew at every step; the engine forks by page table and keeps
the image once.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from bench_search import (
    PROMPT_TOKENS,
    TWO_BY_ONE_TILES,
    agreement,
    build_model,
    environment,
    peak_memory,
    random_inputs,
    used_mib,
)

from llava_cot import SwiresGenerator
from llava_cot.small_world.processor import build_processor


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
    """Of the image's keys and values: of its 2 real tiles or, as transformers keeps them, of all that there may be."""
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
    parser.add_argument("--compile", action="store_true", help="the engine's decoder layers")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = build_model(args.device)
    generator = SwiresGenerator(model, build_processor(), compile=args.compile)
    warm, inputs = (random_inputs(model, length=PROMPT_TOKENS, ratio_id=TWO_BY_ONE_TILES, seed=s) for s in range(2))
    rows = []
    print("| beams | way | wall time | tokens/s | forward steps | keys and values | peak memory | the same tokens |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for num_beams in args.beams:
        run_engine(generator, warm, num_beams, 2)
        run_transformers(model, warm, num_beams, 2)
        ours, tokens = run_engine(generator, inputs, num_beams, args.tokens)
        theirs, expected = run_transformers(model, inputs, num_beams, args.tokens)
        same = agreement([tokens], [expected])
        if args.device == "cpu" and tokens != expected:
            raise SystemExit("a ratio between different searches means nothing")
        for way, row in (("engine", ours), ("transformers", theirs)):
            rows.append({"beams": num_beams, "way": way, **row, "agreement": same})
            ratio = f" ({row['seconds'] / ours['seconds']:.1f}x)" if way != "engine" else ""
            print(
                f"| {num_beams} | {way} | {row['seconds']:.2f} s{ratio} | {row['tokens_per_second']} | "
                f"{row['forward_steps']} | {row['kv_mib']} MiB | {row['peak_mib']:.0f} MiB | {same:.1%} |",
                flush=True,
            )
    if args.out:
        found = {
            "benchmark": "bench_token_beam",
            **environment(args.threads, args.device),
            "new_tokens": args.tokens,
            "rows": rows,
        }
        args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
