"""Run one SWIRES search, with the same seeds and tokens, on the engine and as a plain loop over ``model.generate``.

``python benchmarks/bench_search.py`` uses a random Mllama of about 100M parameters with real image sizes. With
``--device cuda`` the model has the shape of the 11B one, in bfloat16. Random weights close no tag, so the stages are
cut at 24 / 96 / 160 / 16 tokens. The peers are transformers' own:

- cached: the cache of the prompt and its image is computed once and copied. The candidates of a parent are one batch.
- cached-static: the cached loop, with transformers' static cache. On a GPU transformers compiles its steps.
- static: the cached loop on ``StaticDecoder``, which replays a graph on a GPU in place of ``generate``. It draws other
  tokens, finds no tags and scores nothing, but it decodes as many tokens in the same batches.
- returned: the candidates of a parent are one ``generate`` call from pixels, with ``num_return_sequences``.
- returned-static: the same call with ``cache_implementation="static"``, which Mllama has from transformers 5.24 on.
- published: every candidate is a ``generate`` call at batch 1, from pixels. The text is decoded after every token.

``--compile`` compiles the engine's decoder layers and those of static. On a CPU it also makes transformers compile its
steps with a static cache, which is slower there. ``--dtype`` and, on a CPU, ``--quantize`` choose the weights of all
ways.

The engine runs all questions as one continuous batch, which the loops cannot. With ``--drafts`` it also runs with
drafts, which a model of this size does without on a CPU. Random weights repeat nothing, so that row says what drafts
cost where they do not help. All run in one process on the same weights. Each way runs once before it is timed: the
engine runs the very same search, and the loops run one question with 2 tokens a stage. The seconds of that first run,
with compilation and captures, are reported beside the timed ones.

The answers are compared token for token. In float32 on the CPU they must be equal; otherwise the figures of the loop
are an error. Elsewhere the share of equal tokens, up to the first that differs, is reported. A way that fails leaves
its error in its row and does not affect the other figures. The exit code is then 1, unless it was a peer that ran out
of memory or that the installed transformers does not have.
"""

import argparse
import ctypes
import gc
import platform
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from bench_decode import random_mllama
from generate_ways import ReturnedWay, StaticCachedWay, StaticReturnedWay, StaticWay, Unavailable
from helpers.random_mllama import build_random_mllama, random_inputs
from helpers.reference_loop import CachedWay, PublishedWay, swires
from static_decode import StaticDecoder
from timing import Results, check_device

from llava_cot import EngineConfig, SwiresConfig, SwiresGenerator, tiny_path
from llava_cot.engine.drafts import DRAFT_TOKENS
from llava_cot.quantize import check_quantize, loading_settings

ROOT = Path(__file__).parents[1]
STAGE_TOKENS = {"SUMMARY": 24, "CAPTION": 96, "REASONING": 160, "CONCLUSION": 16}
MODEL = dict(
    hidden=640, layers=12, heads=10, kv_heads=5, cross=[3, 7, 11], vocab=32000, ffn=1792,
    image=560, vision_hidden=160, vision_layers=8, std=0.15,
)  # fmt: skip
TWO_BY_ONE_TILES = 5
PROMPT_TOKENS = 40
PAGE_SIZE = 16
PROMPT_PAGES = PROMPT_TOKENS // PAGE_SIZE + 1
MOST_CANDIDATES = 4  # in a stage
SHORT = 2  # tokens per stage of the search that warms up a loop
LOOPS = {  # in this order
    "cached": "cached",
    "cached-static": "cached, static cache",
    "static": "cached, static graph",
    "returned": "num_return_sequences",
    "returned-static": "num_return_sequences, static cache",
    "published": "published",
}


class PeakCudaMemory:
    """Measure the peak of allocated memory above that at the start, in MiB."""

    def __enter__(self):
        torch.cuda.reset_peak_memory_stats()
        self.start = torch.cuda.memory_allocated()
        return self

    def __exit__(self, *error):
        self.mib = (torch.cuda.max_memory_allocated() - self.start) / 2**20


class PeakMemory:
    """Measure the peak of resident memory above that at the start, in MiB, by reading it every 5 ms."""

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
    """Build a model of the 11B model's shape on a GPU, else of about 100M parameters. It never ends by itself."""
    if device == "cuda":
        return random_mllama(str(ROOT / "configs/llama_3_2_11b_vision"), device, torch.bfloat16)
    model = build_random_mllama(**MODEL, seed=0)
    model.generation_config.eos_token_id = None
    return model


def quantized(model: Any, name: str, dtype: str) -> Any:
    """Return ``model`` as transformers loads it with quantised weights."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        settings = loading_settings(name, model.config, dtype, "cpu")
        loaded = type(model).from_pretrained(folder, **settings)
    loaded.generation_config.eos_token_id = None
    return loaded


def peak_memory(model):
    return PeakCudaMemory() if model.device.type == "cuda" else PeakMemory()


def used_mib(generator, questions):
    """Return the MiB of keys and values that the engine reserves before anything is measured, as on a GPU."""
    engine, view = generator.engine, generator.engine.view
    if view.device.type != "cuda":
        return 0.0
    pages = view.kv_cache[:, :, : engine.runner.peak_pages]
    tokens = sum(view.image_tokens(question) for question in questions)
    return (pages.nbytes + view.images.kv[:, :, :tokens].nbytes) / 2**20


def _resident_mib():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


class Ways:
    """Runs the ways of a benchmark one after another, each for a row. A failure does not affect other rows."""

    def __init__(self, results: Results):
        self.results, self.failed = results, list[str]()

    def run(self, way: str, call: Callable[[], dict[str, Any]], **case: Any) -> dict[str, Any] | None:
        """Add a row with ``case`` and the figures of ``call``, and return the figures.

        If ``call`` fails, the row has its error and the result is None.
        """
        row = {**case, "way": way}
        name = ", ".join([*(f"{key} {value}" for key, value in case.items()), way])
        try:
            row |= call()
        except Exception as error:
            at = traceback.extract_tb(error.__traceback__)[-1]
            message = (str(error).splitlines() or [""])[0]
            row["error"] = f"{type(error).__name__} at {Path(at.filename).name}:{at.lineno}: {message}"
            if way == "engine" or not isinstance(error, (torch.OutOfMemoryError, Unavailable)):
                self.failed.append(name)
        self.results.add(row)
        gc.collect()  # compiled layers hold memory in cycles
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if "error" not in row:
            return row
        print(f"{name} failed: {row['error']}", flush=True)
        return None

    def exit(self) -> None:
        """Exit with 1 if a way failed, unless it was a peer that ran out of memory or is not available."""
        sys.exit(f"failed: {'; '.join(self.failed)}" if self.failed else 0)


def search_config(stage_tokens: dict[str, int], rounds: int) -> SwiresConfig:
    limits = {"max_new_tokens": sum(stage_tokens.values()), "max_stage_tokens": stage_tokens}
    return SwiresConfig.published(**limits, cutoff=0.0, max_rounds=rounds)


def pages_needed(config: SwiresConfig) -> int:
    """Return the most pages of a question, so that the peers have the rest of a GPU's memory."""
    drawn = sum(pages_drawn(MOST_CANDIDATES, tokens) for tokens in config.max_stage_tokens.values())
    return PROMPT_PAGES + config.max_rounds * drawn


def pages_drawn(candidates: int, tokens: int) -> int:
    """Return the pages for so many tokens of each branch; the first and last page may be partly filled."""
    return candidates * (tokens // PAGE_SIZE + 2)


def run_engine(generator, questions, config) -> tuple[dict[str, Any], list[list[int]]]:
    """Run all questions as one continuous batch. Returns the figures and the tokens of each answer."""
    batch = {name: torch.cat([question[name] for question in questions]) for name in questions[0]}
    generator.engine.runner.peak_pages = 0
    with peak_memory(generator.model) as memory:
        start = time.perf_counter()
        out = generator.generate(**batch, search=config, seed=0, return_dict_in_generate=True)
        seconds = time.perf_counter() - start
    if held := generator.engine.pages_in_use:
        raise RuntimeError(f"no page must be in use after the search, got {held}")
    usages = [answer.usage for answer in out.answers]
    counts = [sum(getattr(u, key) for u in usages) for key in ("decoded_tokens", "prompt_tokens", "image_encodings")]
    peak = memory.mib + used_mib(generator, questions)
    return figures(len(questions), seconds, *counts, peak), [answer.tokens for answer in out.answers]


def run_loop(open_way, model, tokenizer, questions, config) -> tuple[dict[str, Any], list[list[int]]]:
    """Run the questions one after another. Returns the figures and the tokens of each answer."""
    tokens, counts = [], []
    with peak_memory(model) as memory:
        start = time.perf_counter()
        for inputs in questions:
            way = open_way(model, tokenizer, inputs, backend="native")
            result = swires(way, config, cutoff=lambda stage: config.cutoff, seed=0)
            tokens.append(result.answer.tokens())
            counts.append((way.counts.decoded, way.counts.prefilled, way.counts.image_encodings))
        seconds = time.perf_counter() - start
    return figures(len(questions), seconds, *map(sum, zip(*counts)), memory.mib), tokens


KEYS = ("questions", "seconds", "decoded_tokens", "prefilled_tokens", "image_encodings", "peak_mib")


def figures(*values: float) -> dict[str, Any]:
    """Return the figures of all questions of a way."""
    return dict(zip(KEYS, values, strict=True))


def agreement(found, expected):
    """Return the share of tokens up to the first that differs."""
    same = [takewhile(lambda pair: pair[0] == pair[1], zip(*answers)) for answers in zip(found, expected)]
    return sum(len(list(tokens)) for tokens in same) / sum(map(len, found))


def bench(args: argparse.Namespace, model, ways: Ways) -> list[dict[str, Any]]:
    """Return the rows of the ways that ran, the engine's first."""
    processor = transformers.AutoProcessor.from_pretrained(tiny_path())
    config = search_config(STAGE_TOKENS, args.rounds)
    warm, *questions = (
        random_inputs(model, length=PROMPT_TOKENS, ratio_id=TWO_BY_ONE_TILES, seed=seed)
        for seed in range(args.questions + 1)
    )
    expected: list[list[int]] = []  # the engine's tokens
    is_exact = args.device == "cpu" and model.dtype == torch.float32 and not args.quantize

    def engine(draft_tokens: int | None = None) -> dict[str, Any]:
        num_pages = args.questions * pages_needed(config)
        settings = EngineConfig(PAGE_SIZE, num_pages, compile=args.compile, draft_tokens=draft_tokens)
        generator = SwiresGenerator(model, processor, engine=settings)
        first, _ = run_engine(generator, questions, config)
        found, tokens = run_engine(generator, questions, config)
        if not expected:
            expected.extend(tokens)
        same = agreement(tokens, expected)
        return {"first_run": "the same search", "first_seconds": first["seconds"], **found, "agreement": same}

    def loop(open_way, is_compared: bool) -> dict[str, Any]:
        tokenizer, looped = processor.tokenizer, questions[: args.looped or args.questions]
        short = search_config(dict.fromkeys(STAGE_TOKENS, SHORT), args.rounds)
        first, _ = run_loop(open_way, model, tokenizer, [warm], short)
        found, tokens = run_loop(open_way, model, tokenizer, looped, config)
        row = {"first_run": f"one question, {SHORT} tokens a stage", "first_seconds": first["seconds"], **found}
        if not (is_compared and expected):
            return row
        if is_exact and tokens != expected[: len(looped)]:
            raise RuntimeError(
                "it draws other tokens than the engine, and a ratio between different searches means nothing"
            )
        return {**row, "agreement": agreement(tokens, expected)}

    static = {"max_new_tokens": config.max_new_tokens, "compile": args.compile}
    decoders: dict[int, StaticDecoder] = {}
    opened = {
        "cached": CachedWay,
        "cached-static": partial(StaticCachedWay, **static),
        "static": partial(StaticWay, decoders=decoders, **static),
        "returned": ReturnedWay,
        "returned-static": partial(StaticReturnedWay, **static),
        "published": PublishedWay,
    }
    calls: dict[str, Callable[[], dict[str, Any]]] = {"engine": engine}
    if args.drafts:
        calls["engine, drafts"] = partial(engine, DRAFT_TOKENS)
    calls |= {LOOPS[name]: partial(loop, opened[name], name != "static") for name in args.peers}
    rows = []
    for way, call in calls.items():
        if row := ways.run(way, call):
            rows.append(row)
            same = (
                f"; {row['agreement']:.1%} of the tokens are the engine's"
                if way != "engine" and "agreement" in row
                else ""
            )
            print(
                f"{way} {row['seconds']:.1f} s, at first {row['first_seconds']:.1f} s ({row['first_run']}){same}",
                flush=True,
            )
        if way == LOOPS["static"]:
            decoders.clear()
    return rows


def report(rows: list[dict[str, Any]]) -> None:
    """Print the figures as a table, with ratios to the engine's. Ratios are per question, except for memory."""
    print("| way | questions | wall time | tokens decoded | tokens prefilled | image encodings | peak memory |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    engine = next((row for row in rows if row["way"] == "engine"), None)
    for row in rows:
        cells = []
        for key, unit, digits in zip(KEYS[1:], (" s", "", "", "", " MiB"), (1, 0, 0, 0, 0)):
            ratio = ""
            if engine and row is not engine and engine[key]:
                of_question = 1 if key == "peak_mib" else engine["questions"] / row["questions"]
                ratio = f" ({row[key] / engine[key] * of_question:.1f}x)"
            cells.append(f"{row[key]:.{digits}f}{unit}{ratio}")
        print(f"| {row['way']} | {row['questions']} | {' | '.join(cells)} |", flush=True)


def environment(threads, device):
    """Describe the machine and the versions that the figures were measured with."""
    cpu = f"{threads} cores, {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    return {
        "machine": torch.cuda.get_device_name() if device == "cuda" else cpu,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=2)
    parser.add_argument("--looped", type=int, help="questions for the loops, which run them one by one; default: all")
    parser.add_argument("--peers", nargs="*", choices=LOOPS, default=[*LOOPS], help="loops to run; default: all")
    parser.add_argument("--drafts", action="store_true", help="also run the engine with drafts")
    parser.add_argument("--rounds", type=int, default=1, help="rounds of SWIRES; no stage closes here, so none passes")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32, on a GPU bfloat16")
    parser.add_argument("--quantize", choices=("int8",), help="quantise the weights of all ways, on the CPU")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=torch.cuda.is_available(),
        help="compile the engine's layers, and the static peers'",
    )
    parser.add_argument("--json", type=Path, help="write the figures to this JSON file")
    args = parser.parse_args()
    check_device(args.device)
    dtype = args.dtype or {"cpu": "float32", "cuda": "bfloat16"}[args.device]
    if args.quantize:
        if args.device != "cpu":
            parser.error(f"--device must be cpu with --quantize, got {args.device}")
        check_quantize(args.quantize, dtype, "cpu")
    torch.set_num_threads(args.threads)
    model = build_model(args.device)
    model = quantized(model, args.quantize, dtype) if args.quantize else model.to(getattr(torch, dtype))
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    print(
        f"{millions:.0f}M parameters, {args.questions} questions, {args.rounds} rounds, {args.threads} threads",
        flush=True,
    )
    results = Results(
        args.json,
        benchmark="bench_search",
        **environment(args.threads, args.device),
        parameters_million=round(millions, 1),
        questions=args.questions,
        rounds=args.rounds,
        dtype=dtype,
        quantize=args.quantize,
        compile=args.compile,
        stage_tokens=STAGE_TOKENS,
    )
    ways = Ways(results)
    report(bench(args, model, ways))
    ways.exit()


if __name__ == "__main__":
    main()
