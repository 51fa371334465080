"""The same SWIRES, same seeds and same tokens, on the engine and as a plain loop over ``model.generate``.

``python benchmarks/bench_search.py --report`` runs it on a random Mllama of about 100M parameters with real image
sizes. Random weights close no tag, so every stage is cut at 24 / 96 / 160 / 16 tokens. The peers are transformers' own:

- published: every candidate is a ``generate`` call at batch 1, from pixels, and the text is decoded after every token.
- cached: the prompt's cache, image included, is computed once and copied; a parent's candidates run as one batch.

All three run in one process on the same weights; the answers are compared token for token before a ratio is printed.
"""

import argparse
import ctypes
import json
import platform
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from helpers.random_mllama import build_random_mllama, random_inputs
from helpers.reference_loop import CachedWay, PublishedWay, swires

from llava_cot import SwiresConfig, SwiresGenerator
from llava_cot.train.tiny_processor import build_processor

STAGE_TOKENS = {"SUMMARY": 24, "CAPTION": 96, "REASONING": 160, "CONCLUSION": 16}
MODEL = dict(
    hidden=640, layers=12, heads=10, kv_heads=5, cross=[3, 7, 11], vocab=32000, ffn=1792,
    image=560, vision_hidden=160, vision_layers=8, std=0.15,
)  # fmt: skip
TWO_BY_ONE_TILES = 5
PROMPT_TOKENS = 40


class PeakMemory:
    """The most resident memory over that at the start, in MiB, looked at every 5 ms."""

    def __enter__(self):
        ctypes.CDLL(None).malloc_trim(0)
        self.start = self.peak = _resident_mib()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *error):
        self._stop.set()
        self._thread.join()

    def _watch(self):
        while not self._stop.wait(0.005):
            self.peak = max(self.peak, _resident_mib())

    @property
    def mib(self):
        return self.peak - self.start


def _resident_mib():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


@dataclass
class Figures:
    way: str
    seconds: float
    decoded_tokens: int
    prefilled_tokens: int
    image_encodings: int
    peak_mib: float
    tokens: list[int]


def run_engine(generator, inputs, config, seed):
    with PeakMemory() as memory:
        start = time.perf_counter()
        out = generator.generate(**inputs, search=config, seed=seed, return_dict_in_generate=True)
        seconds = time.perf_counter() - start
    (answer,) = out.answers
    usage = answer.usage
    counts = (usage.decoded_tokens, usage.prompt_tokens, usage.image_encodings)
    return Figures("engine", seconds, *counts, memory.mib, answer.tokens)


def run_loop(name, way_type, model, tokenizer, inputs, config, seed):
    with PeakMemory() as memory:
        start = time.perf_counter()
        way = way_type(model, tokenizer, inputs, backend="native")
        result = swires(way, config, cutoff=lambda stage: config.cutoff, seed=seed)
        seconds = time.perf_counter() - start
    counts = way.counts
    tokens = result.answer.tokens()
    return Figures(name, seconds, counts.decoded, counts.prefilled, counts.image_encodings, memory.mib, tokens)


def bench(questions, rounds, threads, log=print):
    torch.set_num_threads(threads)
    model = build_random_mllama(**MODEL, seed=0)
    model.generation_config.eos_token_id = None  # every stage runs to its length
    processor = build_processor()
    generator = SwiresGenerator(model, processor)
    config = SwiresConfig.published(
        max_new_tokens=sum(STAGE_TOKENS.values()), max_stage_tokens=STAGE_TOKENS, cutoff=0.0, max_rounds=rounds
    )
    size = sum(p.numel() for p in model.parameters()) / 1e6
    log(f"{size:.0f}M parameters, {questions} questions, {rounds} rounds, {threads} threads, torch {torch.__version__}")
    warm = random_inputs(model, length=PROMPT_TOKENS, ratio_id=TWO_BY_ONE_TILES, seed=99)
    model.generate(**warm, max_new_tokens=2, do_sample=False)
    generator.generate(**warm, search="greedy", max_new_tokens=2)
    rows = []
    for seed in range(questions):
        inputs = random_inputs(model, length=PROMPT_TOKENS, ratio_id=TWO_BY_ONE_TILES, seed=seed)
        engine = run_engine(generator, inputs, config, seed)
        held = generator.engine.pages_in_use
        log(f"question {seed}: image encodings {engine.image_encodings}, pages in use afterwards {held}")
        assert held == 0
        ways = [engine]
        for name, way in (("cached", CachedWay), ("published", PublishedWay)):
            ways.append(run_loop(name, way, model, processor.tokenizer, inputs, config, seed))
            same = ways[-1].tokens == engine.tokens
            log(
                f"question {seed}: {name} {ways[-1].seconds:.1f} s, engine {engine.seconds:.1f} s, "
                f"{'the same' if same else 'OTHER'} tokens",
                flush=True,
            )
            if not same:
                raise SystemExit("a ratio between different searches means nothing")
        rows.append(ways)
    return size, rows


def report(size, rows):
    """Medians over the questions, and their ratios to the engine's."""

    def median(way, key):
        values = sorted(getattr(ways[way], key) for ways in rows)
        return values[len(values) // 2]

    keys = ("seconds", "decoded_tokens", "prefilled_tokens", "image_encodings", "peak_mib")
    names = [ways.way for ways in rows[0]]
    table = {name: {key: median(way, key) for key in keys} for way, name in enumerate(names)}
    lines = [
        "| way | wall time | tokens decoded | tokens prefilled | image encodings | peak memory |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name in names:
        cells = []
        for key, unit, digits in zip(keys, (" s", "", "", "", " MiB"), (1, 0, 0, 0, 0)):
            value, base = table[name][key], table["engine"][key]
            cells.append(f"{value:.{digits}f}{unit}" + ("" if name == "engine" else f" ({value / base:.1f}x)"))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    print("\n".join(lines))
    return table


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3, help="rounds of SWIRES: without a closed stage none passes")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--report", action="store_true", help="print the table")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    args = parser.parse_args()
    size, rows = bench(args.questions, args.rounds, args.threads)
    table = report(size, rows)
    if args.out:
        machine = f"{torch.get_num_threads()} cores, {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
        figures = {
            "benchmark": "bench_search",
            "machine": machine,
            "torch": torch.__version__,
            "parameters_million": round(size, 1),
            "questions": args.questions,
            "rounds": args.rounds,
            "stage_tokens": STAGE_TOKENS,
            "median": table,
        }
        args.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
