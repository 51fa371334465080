"""N sampled answers to each of 1, 8 and 64 questions: tokens per second and peak memory.

``python benchmarks/bench_throughput.py`` runs it on bench_search's random Mllama of about 100M parameters, with
``--device cuda`` of the 11B model's shape. The peer is ``model.generate(num_return_sequences=N)`` on a batch of all
questions, which have prompts of one length, so that it pads nothing; where that does not fit into memory, one question
after another.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from bench_search import (
    PROMPT_TOKENS,
    TWO_BY_ONE_TILES,
    build_model,
    environment,
    peak_memory,
    random_inputs,
    used_mib,
)

from llava_cot import SwiresGenerator
from llava_cot.small_world.processor import build_processor

SAMPLING = {"temperature": 1.0, "top_p": 0.9, "top_k": 0}


def timed(model, call) -> tuple[float, float]:
    """Seconds and peak MiB."""
    with peak_memory(model) as memory:
        start = time.perf_counter()
        call()
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    return seconds, memory.mib


def joined(questions: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.cat([question[name] for question in questions]) for name in questions[0]}


def bench(model, generator: SwiresGenerator, questions: list[Any], n: int, tokens: int) -> list[dict[str, Any]]:
    settings = {**SAMPLING, "num_return_sequences": n, "max_new_tokens": tokens}

    def engine():
        generator.generate(**joined(questions), search="sample", seed=0, **settings)

    def together():
        model.generate(**joined(questions), do_sample=True, **settings)

    def in_turn():
        for question in questions:
            model.generate(**question, do_sample=True, **settings)

    rows = []
    for way, call in (("engine", engine), ("transformers, all at once", together), ("transformers, in turn", in_turn)):
        if call is in_turn and (len(questions) == 1 or len(rows) == 2):
            continue
        try:
            generator.engine.runner.peak_pages = 0
            seconds, mib = timed(model, call)
            mib += used_mib(generator, questions) if call is engine else 0
        except torch.OutOfMemoryError:
            print(f"| {len(questions)} | {way} | out of memory | | | |", flush=True)
            continue
        rate = len(questions) * n * tokens / seconds
        rows.append(
            {"questions": len(questions), "way": way, "seconds": seconds, "tokens_per_second": rate, "mib": mib}
        )
        ratio = f" ({seconds / rows[0]['seconds']:.1f}x)" if way != "engine" else ""
        print(f"| {len(questions)} | {way} | {seconds:.1f} s{ratio} | {rate:.0f} | {mib:.0f} MiB |", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--candidates", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--compile", action="store_true", help="the engine's decoder layers")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = build_model(args.device)
    # Pages for what is asked, so that the peer has the rest of a GPU's memory.
    per_question = PROMPT_TOKENS // 16 + 1 + args.candidates * (args.tokens // 16 + 2)
    num_pages = max(args.questions) * per_question
    generator = SwiresGenerator(model, build_processor(), num_pages=num_pages, compile=args.compile)
    warm, *questions = (
        random_inputs(model, length=PROMPT_TOKENS, ratio_id=TWO_BY_ONE_TILES, seed=seed)
        for seed in range(1 + max(args.questions))
    )
    print("| questions | way | wall time | tokens/s | peak memory |\n| --- | --- | --- | --- | --- |")
    model.generate(**warm, max_new_tokens=2, do_sample=False)
    rows = []
    for count in args.questions:
        chosen = questions[:count]
        generator.generate(**joined(chosen), search="sample", num_return_sequences=args.candidates, max_new_tokens=6)
        rows += bench(model, generator, chosen, args.candidates, args.tokens)
    if args.out:
        found = {
            "benchmark": "bench_throughput",
            **environment(args.threads, args.device),
            "candidates": args.candidates,
            "new_tokens": args.tokens,
            "compile": args.compile,
            "rows": rows,
        }
        args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
