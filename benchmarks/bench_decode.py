"""Measure a decode step for N candidates of one question: ``python benchmarks/bench_decode.py`` on a GPU.

The model is an Mllama of the 11B model's shape with random weights. The image has 1 or 4 real tiles, and the prompt has
600 tokens of text. The figures are milliseconds a step, including the host. One run measures

- the engine, beside the bytes that a step must read and the share of the copy bandwidth that this is;
- transformers with a static cache and a CUDA graph for each step (``static_decode.py``), which is its fastest form;
- ``generate(num_return_sequences=N)`` of transformers, for N up to ``--generate-candidates``.

``--compile`` makes torch compile the decoder layers of the first two. ``--profile`` profiles a few steps of the engine
instead. It shows the calls of the CUDA runtime and the kernels in a step, and their time on the device by name.
"""

import argparse
import gc
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from static_decode import StaticDecoder
from timing import Results, check_device, copy_bandwidth, environment, synchronize
from transformers import AutoConfig, MllamaForConditionalGeneration

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from helpers.random_mllama import open_gates, random_inputs

from llava_cot.core import Expand, SamplingParams
from llava_cot.engine.config import EngineConfig
from llava_cot.engine.engine import Engine
from llava_cot.search.drive import Drive
from llava_cot_kernels.stage_tags import StageTags

ROOT = Path(__file__).parents[1]
SAMPLING = SamplingParams(temperature=1.0, top_p=0.9)
RATIO_OF_TILES = {1: 1, 4: 6}  # 1 x 1 and 2 x 2
PROFILED_STEPS = 8  # each has thousands of events, and the profiler reads an event in about 0.2 ms


def random_mllama(folder: str, device: str, dtype: torch.dtype) -> MllamaForConditionalGeneration:
    """Build a random Mllama on ``device`` with open gates. It never ends an answer by itself."""
    settings = AutoConfig.from_pretrained(folder)
    torch.manual_seed(0)
    with torch.device(device):
        model = MllamaForConditionalGeneration._from_config(settings, dtype=dtype).eval()
    open_gates(model)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


def step_bytes(model: MllamaForConditionalGeneration, n: int, tiles: int, text: int, private: int) -> int:
    """Return the bytes that a step must read: weights, image and prompt once, and the keys and values of candidates."""
    settings = model.config.text_config
    weights = sum(
        getattr(parameter, "qdata", parameter).nbytes  # of an int8 weight
        for name, parameter in model.named_parameters()
        if ("language_model.layers" in name or "lm_head" in name)
        and not name.endswith(("cross_attn.k_proj.weight", "cross_attn.v_proj.weight"))
    )
    vision = model.config.vision_config
    image_tokens = tiles * ((vision.image_size // vision.patch_size) ** 2 + 1)
    num_cross = len(settings.cross_attention_layers)
    head_dim = settings.hidden_size // settings.num_attention_heads
    per_token = 2 * settings.num_key_value_heads * head_dim
    keys = num_cross * image_tokens + (settings.num_hidden_layers - num_cross) * (text + n * private)
    return weights + per_token * keys * model.dtype.itemsize


def grow(engine: Engine, inputs: dict[str, torch.Tensor], n: int, tokens: int) -> Drive:
    """``n`` continuations of the prompt, of ``tokens`` tokens each."""
    session = engine.open(inputs)

    def program():
        yield [Expand(session.root, tuple(range(n)), SAMPLING, tokens, frozenset())]

    return Drive(session, program())


def engine_step(engine: Engine, inputs: dict[str, torch.Tensor], n: int, tokens: int) -> float:
    """Return the milliseconds of a step in the second of two runs; the first captures."""

    for _ in range(2):
        drive, looks = grow(engine, inputs, n, tokens), []
        while not drive.done:
            engine.step()  # ends with a look at what was drawn
            looks.append((drive.session.usage.steps, time.perf_counter()))
        if drive.error:
            raise drive.error
    (first, start), (last, end) = looks[1], looks[-2]
    return (end - start) / (last - first) * 1e3


def static_step(model, inputs: dict[str, torch.Tensor], n: int, tokens: int, *, compile: bool) -> float:
    """Return the milliseconds of a step with a static cache. Opening compiles and captures; the first run warms up."""
    temperature, top_p = SAMPLING.temperature, SAMPLING.top_p
    decoder = StaticDecoder(model, inputs, n, tokens, temperature=temperature, top_p=top_p, compile=compile)
    for _ in range(2):
        decoder.begin()
        synchronize(model.device)
        started = time.perf_counter()
        for _ in range(tokens):
            decoder.step()
        synchronize(model.device)
        seconds = time.perf_counter() - started
    return seconds / tokens * 1e3


def generate_step(model, inputs: dict[str, torch.Tensor], n: int, tokens: int) -> float:
    """Return the milliseconds of a step of ``generate``, from the difference of a long and a short call."""
    settings: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_p": 0.9, "top_k": 0}
    seconds = []
    for new in (2, 2, tokens):
        started = time.perf_counter()
        model.generate(**inputs, **settings, num_return_sequences=n, max_new_tokens=new)
        synchronize(model.device)
        seconds.append(time.perf_counter() - started)
    return (seconds[2] - seconds[1]) / (tokens - 2) * 1e3


def profiled(engine: Engine, inputs: dict[str, torch.Tensor], n: int) -> dict[str, Any]:
    """Return, per step, the CUDA runtime calls by name, the number of kernels, and their device time by name."""

    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    profile, drive = torch.profiler.profile(activities=kinds), grow(engine, inputs, n, 3 * PROFILED_STEPS)
    usage = drive.session.usage
    while usage.steps < PROFILED_STEPS:  # the prefill, and what captures
        engine.step()
    before = usage.steps
    with profile:
        while usage.steps < before + PROFILED_STEPS:
            engine.step()
        synchronize(engine.view.device)
    drive.cancel()
    count = usage.steps - before
    calls: dict[str, float] = {}
    kernels: dict[str, float] = {}
    num_kernels = 0
    for event in profile.events():
        if event.device_type == torch.profiler.DeviceType.CUDA:
            num_kernels += 1
            kernels[event.name] = kernels.get(event.name, 0) + event.device_time / count
        elif event.name.startswith(("cuda", "cu")):
            calls[event.name] = calls.get(event.name, 0) + 1 / count
    longest = dict(sorted(kernels.items(), key=lambda kernel: -kernel[1])[:30])
    return {"steps": count, "calls": calls, "kernels": num_kernels / count, "microseconds": longest}


def attempt(step: Callable[[], float]) -> tuple[float | None, str]:
    """Return milliseconds and the text that shows them. A peer that fails does not affect other figures."""
    try:
        milliseconds = step()
        return milliseconds, f"{milliseconds:.2f}"
    except Exception as error:
        shown = "out of memory" if isinstance(error, torch.OutOfMemoryError) else f"{type(error).__name__}: {error}"
        return None, shown.split("\n")[0][:120]
    finally:
        gc.collect()  # compiled layers refer to each other in a circle
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "configs/llama_3_2_11b_vision"), help="a folder with config.json")
    parser.add_argument("--candidates", type=int, nargs="+", default=[1, 4, 8, 16, 32, 64])
    parser.add_argument("--generate-candidates", type=int, default=16, help="the largest N that generate runs with")
    parser.add_argument("--tiles", type=int, nargs="+", default=[1, 4], choices=RATIO_OF_TILES)
    parser.add_argument("--text", type=int, default=600, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=150, help="tokens that each candidate draws")
    parser.add_argument("--steps-per-look", type=int)
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=torch.cuda.is_available(),
        help="compile the decoder layers",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--profile", action="store_true", help="profile a few steps of the engine instead")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    check_device(args.device)
    model = random_mllama(args.model, args.device, torch.bfloat16 if args.device == "cuda" else torch.float32)
    tags = StageTags([b"a", b"</x>"], ["</x>"])
    num_pages = -(-args.text // 16) + max(args.candidates) * (-(-args.tokens // 16) + 2)
    config = EngineConfig(  # without drafts, with which a step would have more rows than candidates
        num_pages=num_pages, steps_per_look=args.steps_per_look, compile=args.compile, draft_tokens=0
    )
    engine = Engine(model, tags, config=config)
    bandwidth = copy_bandwidth(args.device)
    results = Results(args.json, machine=environment(args.device), copy_bandwidth=bandwidth, settings=vars(args))
    print(f"{environment(args.device)}; copy bandwidth {bandwidth / 1e9:.0f} GB/s")
    if args.profile:
        for tiles in args.tiles:
            inputs = random_inputs(model, length=args.text, ratio_id=RATIO_OF_TILES[tiles], seed=0)
            for n in args.candidates:
                found = profiled(engine, inputs, n)
                results.add({"tiles": tiles, "candidates": n, "profile": found})
                print(f"tiles {tiles}, candidates {n}: {found['kernels']:.0f} kernels a step, calls {found['calls']}")
                for name, microseconds in [*found["microseconds"].items()][:12]:
                    print(f"  {microseconds:8.1f} us  {name[:100]}", flush=True)
        return
    print("| tiles | candidates | engine, ms a step | bytes, GB | of copy bandwidth | static cache, graph | generate |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    failed = False
    for tiles in args.tiles:
        inputs = random_inputs(model, length=args.text, ratio_id=RATIO_OF_TILES[tiles], seed=0)
        for n in args.candidates:
            ours, shown = attempt(partial(engine_step, engine, inputs, n, args.tokens))
            static = attempt(partial(static_step, model, inputs, n, args.tokens, compile=args.compile))
            generate: tuple[float | None, str] = (None, "not run")
            if n <= args.generate_candidates:
                generate = attempt(partial(generate_step, model, inputs, n, args.tokens))
            size = step_bytes(model, n, tiles, args.text, args.tokens // 2)
            share = size / (ours / 1e3) / bandwidth if ours else None
            row = {"tiles": tiles, "candidates": n, "ms": ours, "bytes": size, "share": share}
            row |= {"static_ms": static[0], "generate_ms": generate[0]}
            row["errors"] = [cell for value, cell in ((ours, shown), static, generate) if value is None]
            results.add(row)
            failed |= ours is None
            peers = [f"{cell} ({value / ours:.1f}x)" if value and ours else cell for value, cell in (static, generate)]
            cells = [tiles, n, shown, f"{size / 1e9:.2f}", f"{share:.0%}" if share else "", *peers]
            print(f"| {' | '.join(map(str, cells))} |", flush=True)
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
