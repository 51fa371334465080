"""The same SWIRES, same seeds and same tokens, on the engine and as a plain loop over ``model.generate``.

``python benchmarks/bench_search.py`` runs it on a random Mllama of about 100M parameters with real image sizes, with
``--device cuda`` on one of the 11B model's shape in bfloat16. Random weights close no tag, so every stage is cut at
24 / 96 / 160 / 16 tokens. The peers are transformers' own:

- published: every candidate is a ``generate`` call at batch 1, from pixels, and the text is decoded after every token.
- cached: the prompt's cache, image included, is computed once and copied; a parent's candidates run as one batch.

The engine takes all questions as one continuous batch, which the loops can't. All three run in one process on the same
weights, and the answers are compared token for token: on the CPU they must be equal before a ratio is printed; in
bfloat16 the share of equal tokens, up to the first that differs, stands beside it.
"""

import argparse
import ctypes
import json
import platform
import sys
import threading
import time
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from bench_decode import random_mllama
from helpers.random_mllama import build_random_mllama, random_inputs
from helpers.reference_loop import CachedWay, PublishedWay, swires

from llava_cot import SwiresConfig, SwiresGenerator
from llava_cot.small_world.processor import build_processor

ROOT = Path(__file__).parents[1]
STAGE_TOKENS = {"SUMMARY": 24, "CAPTION": 96, "REASONING": 160, "CONCLUSION": 16}
MODEL = dict(
    hidden=640, layers=12, heads=10, kv_heads=5, cross=[3, 7, 11], vocab=32000, ffn=1792,
    image=560, vision_hidden=160, vision_layers=8, std=0.15,
)  # fmt: skip
TWO_BY_ONE_TILES = 5
PROMPT_TOKENS = 40


class PeakCudaMemory:
    """The most allocated memory over that at the start, in MiB."""

    def __enter__(self):
        torch.cuda.reset_peak_memory_stats()
        self.start = torch.cuda.memory_allocated()
        return self

    def __exit__(self, *error):
        self.mib = (torch.cuda.max_memory_allocated() - self.start) / 2**20


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


def build_model(device):
    """Of the 11B model's shape on a GPU, of about 100M parameters elsewhere; it never ends by itself."""
    if device == "cuda":
        return random_mllama(str(ROOT / "configs/llama_3_2_11b_vision"), device, torch.bfloat16)
    model = build_random_mllama(**MODEL, seed=0)
    model.generation_config.eos_token_id = None
    return model


def peak_memory(model):
    return PeakCudaMemory() if model.device.type == "cuda" else PeakMemory()


def used_mib(generator, questions):
    """Of the keys and values that the engine has reserved before anything is measured, as it does on a GPU."""
    engine, view = generator.engine, generator.engine.view
    if view.device.type != "cuda":
        return 0.0
    pages = view.kv_cache[:, :, : engine.runner.peak_pages]
    tokens = sum(view.image_tokens(question) for question in questions)
    return (pages.nbytes + view.images.kv[:, :, :tokens].nbytes) / 2**20


def _resident_mib():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


@dataclass
class Figures:
    """Of all of its questions together."""

    way: str
    questions: int
    seconds: float
    decoded_tokens: int
    prefilled_tokens: int
    image_encodings: int
    peak_mib: float
    tokens: list[list[int]]
    agreement: float = 1.0


def run_engine(generator, questions, config, seed):
    """All questions as one continuous batch."""
    batch = {name: torch.cat([question[name] for question in questions]) for name in questions[0]}
    generator.engine.runner.peak_pages = 0
    with peak_memory(generator.model) as memory:
        start = time.perf_counter()
        out = generator.generate(**batch, search=config, seed=seed, return_dict_in_generate=True)
        seconds = time.perf_counter() - start
    usages = [answer.usage for answer in out.answers]
    counts = [sum(getattr(u, key) for u in usages) for key in ("decoded_tokens", "prompt_tokens", "image_encodings")]
    peak = memory.mib + used_mib(generator, questions)
    return Figures("engine", len(questions), seconds, *counts, peak, [answer.tokens for answer in out.answers])


def run_loop(name, way_type, model, tokenizer, questions, config, seed):
    """The questions one after another."""
    tokens, counts = [], []
    with peak_memory(model) as memory:
        start = time.perf_counter()
        for inputs in questions:
            way = way_type(model, tokenizer, inputs, backend="native")
            result = swires(way, config, cutoff=lambda stage: config.cutoff, seed=seed)
            tokens.append(result.answer.tokens())
            counts.append((way.counts.decoded, way.counts.prefilled, way.counts.image_encodings))
        seconds = time.perf_counter() - start
    return Figures(name, len(questions), seconds, *map(sum, zip(*counts)), memory.mib, tokens)


def agreement(found, expected):
    """The share of tokens up to the first that differs."""
    same = [takewhile(lambda pair: pair[0] == pair[1], zip(*answers)) for answers in zip(found, expected)]
    return sum(len(list(tokens)) for tokens in same) / sum(map(len, found))


def bench(num_questions, num_looped, rounds, threads, device, compiled=False, log=print):
    torch.set_num_threads(threads)
    model, processor = build_model(device), build_processor()
    generator = SwiresGenerator(model, processor, compile=compiled)
    config = SwiresConfig.published(
        max_new_tokens=sum(STAGE_TOKENS.values()), max_stage_tokens=STAGE_TOKENS, cutoff=0.0, max_rounds=rounds
    )
    size = sum(p.numel() for p in model.parameters()) / 1e6
    log(f"{size:.0f}M parameters, {num_questions} questions, {rounds} rounds, {threads} threads")
    warm, *questions = (
        random_inputs(model, length=PROMPT_TOKENS, ratio_id=TWO_BY_ONE_TILES, seed=seed)
        for seed in range(num_questions + 1)
    )
    model.generate(**warm, max_new_tokens=2, do_sample=False)
    generator.generate(**warm, search="greedy", max_new_tokens=2)
    engine = run_engine(generator, questions, config, seed=0)
    held = generator.engine.pages_in_use
    log(
        f"engine {engine.seconds:.1f} s, {engine.image_encodings / num_questions:.0f} image encoding per question, ",
        end="",
    )
    log(f"{held} pages in use afterwards", flush=True)
    assert held == 0
    ways = [engine]
    for name, way in (("cached", CachedWay), ("published", PublishedWay)):
        looped = questions[:num_looped]
        ways.append(run_loop(name, way, model, processor.tokenizer, looped, config, seed=0))
        ways[-1].agreement = agreement(ways[-1].tokens, engine.tokens)
        log(f"{name} {ways[-1].seconds:.1f} s, {ways[-1].agreement:.1%} of the tokens are the same", flush=True)
        if device == "cpu" and ways[-1].tokens != engine.tokens[:num_looped]:
            raise SystemExit("a ratio between different searches means nothing")
    return size, ways


KEYS = ("seconds", "decoded_tokens", "prefilled_tokens", "image_encodings", "peak_mib")


def report(ways):
    """The figures as a table, with their ratios to the engine's: those of a question, and of memory."""
    print("| way | questions | wall time | tokens decoded | tokens prefilled | image encodings | peak memory |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    engine = ways[0]
    for figures in ways:
        cells = []
        for key, unit, digits in zip(KEYS, (" s", "", "", "", " MiB"), (1, 0, 0, 0, 0)):
            value, base = getattr(figures, key), getattr(engine, key)
            ratio = value / base * (1 if key == "peak_mib" else engine.questions / figures.questions)
            cells.append(f"{value:.{digits}f}{unit}" + ("" if figures is engine else f" ({ratio:.1f}x)"))
        print(f"| {figures.way} | {figures.questions} | " + " | ".join(cells) + " |")


def environment(threads, device):
    """What the figures were measured on, and with."""
    cpu = f"{threads} cores, {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    return {
        "machine": torch.cuda.get_device_name() if device == "cuda" else cpu,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=2)
    parser.add_argument("--looped", type=int, help="of them for the loops, which take one after another; all of them")
    parser.add_argument("--rounds", type=int, default=1, help="rounds of SWIRES: without a closed stage none passes")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--compile", action="store_true", help="the engine's decoder layers")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    args = parser.parse_args()
    size, ways = bench(
        args.questions, args.looped or args.questions, args.rounds, args.threads, args.device, args.compile
    )
    report(ways)
    if args.out:
        figures = {
            "benchmark": "bench_search",
            **environment(args.threads, args.device),
            "parameters_million": round(size, 1),
            "questions": args.questions,
            "rounds": args.rounds,
            "compile": args.compile,
            "stage_tokens": STAGE_TOKENS,
            "totals": {
                figures.way: {key: getattr(figures, key) for key in ("questions", *KEYS, "agreement")}
                for figures in ways
            },
        }
        args.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
