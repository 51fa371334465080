"""Measure N sampled answers to each of 1, 8 and 64 questions: tokens per second and peak memory.

``python benchmarks/bench_throughput.py`` uses the random Mllama of bench_search with about 100M parameters. With
``--device cuda`` it has the shape of the 11B model. The peer is ``model.generate(num_return_sequences=N)`` on a batch
of all questions. Their prompts have the same length, so nothing is padded. If that does not fit in memory, the peer
runs one question after another. Only ``--in-turn`` of them are asked, and the seconds are scaled to all; the row's name
says so.

Each way runs once before it is timed, and the seconds of that first run are reported too. The engine runs the very same
questions, so it compiles and captures everything that it needs. transformers runs 2 tokens. A way that fails leaves its
error in its row.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_search import (
    PAGE_SIZE,
    PROMPT_PAGES,
    PROMPT_TOKENS,
    TWO_BY_ONE_TILES,
    Ways,
    build_model,
    environment,
    pages_drawn,
    peak_memory,
    random_inputs,
    used_mib,
)
from timing import Results, check_device, synchronize
from transformers import AutoProcessor

from llava_cot import EngineConfig, SwiresGenerator, tiny_path

SAMPLING = {"temperature": 1.0, "top_p": 0.9, "top_k": 0}


def timed(model, call) -> tuple[float, float]:
    """Return seconds and peak MiB."""
    with peak_memory(model) as memory:
        start = time.perf_counter()
        call()
        synchronize(model.device)
        seconds = time.perf_counter() - start
    return seconds, memory.mib


def joined(questions: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.cat([question[name] for question in questions]) for name in questions[0]}


def bench(
    model, generator: SwiresGenerator, ways: Ways, questions: list[Any], n: int, tokens: int, in_turn: int
) -> None:
    def ask(limit: int, questions: list[Any], function: Callable[..., Any], **kind: Any) -> tuple[float, float]:
        settings = {**SAMPLING, "num_return_sequences": n, "max_new_tokens": limit, **kind}
        return timed(model, lambda: function(**joined(questions), **settings))

    def row(first: float, seconds: float, mib: float) -> dict[str, float]:
        rate = len(questions) * n * tokens / seconds
        return {"first_seconds": first, "seconds": seconds, "tokens_per_second": rate, "mib": mib}

    def engine() -> dict[str, float]:
        first, _ = ask(tokens, questions, generator.generate, search="sample", seed=0)
        generator.engine.runner.peak_pages = 0
        seconds, mib = ask(tokens, questions, generator.generate, search="sample", seed=0)
        return row(first, seconds, mib + used_mib(generator, questions))

    def together() -> dict[str, float]:
        first, _ = ask(2, questions, model.generate, do_sample=True)
        return row(first, *ask(tokens, questions, model.generate, do_sample=True))

    def alone() -> dict[str, float]:
        first, _ = ask(2, questions[:1], model.generate, do_sample=True)
        found = [ask(tokens, [question], model.generate, do_sample=True) for question in questions[:in_turn]]
        seconds = sum(seconds for seconds, _ in found) * len(questions) / len(found)
        return row(first, seconds, max(mib for _, mib in found))

    some = f", from {in_turn} of them" if in_turn < len(questions) else ""
    calls = {"engine": engine, "transformers, all at once": together, f"transformers, in turn{some}": alone}
    seconds: dict[str, float] = {}
    for way, call in calls.items():
        if call is alone and (len(questions) == 1 or "transformers, all at once" in seconds):
            continue
        if not (found := ways.run(way, call, questions=len(questions))):
            continue
        seconds[way] = found["seconds"]
        ratio = f" ({found['seconds'] / seconds['engine']:.1f}x)" if way != "engine" and "engine" in seconds else ""
        print(
            f"| {len(questions)} | {way} | {found['seconds']:.1f} s{ratio} | {found['first_seconds']:.1f} s | "
            f"{found['tokens_per_second']:.0f} | {found['mib']:.0f} MiB |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--candidates", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--in-turn", type=int, default=4, help="questions that are actually asked one after another")
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
    # Only the pages that are needed, so that the peer has the rest of a GPU's memory.
    per_question = PROMPT_PAGES + pages_drawn(args.candidates, args.tokens)
    engine = EngineConfig(PAGE_SIZE, max(args.questions) * per_question, compile=args.compile)
    generator = SwiresGenerator(model, AutoProcessor.from_pretrained(tiny_path()), engine=engine)
    questions = [
        random_inputs(model, length=PROMPT_TOKENS, ratio_id=TWO_BY_ONE_TILES, seed=1 + index)
        for index in range(max(args.questions))
    ]
    results = Results(
        args.json,
        benchmark="bench_throughput",
        **environment(args.threads, args.device),
        candidates=args.candidates,
        new_tokens=args.tokens,
        compile=args.compile,
    )
    ways = Ways(results)
    print("| questions | way | wall time | at first | tokens/s | peak memory |\n| --- | --- | --- | --- | --- | --- |")
    for count in args.questions:
        bench(model, generator, ways, questions[:count], args.candidates, args.tokens, args.in_turn)
    ways.exit()


if __name__ == "__main__":
    main()
