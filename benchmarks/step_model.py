"""Estimate the decode step on paper: its bytes, graph nodes and expected milliseconds on an H100 and an H200.

``python benchmarks/step_model.py --compile`` needs no GPU and measures nothing. The engine's own step runs on tensors
without data, in an Mllama of the 11B model's shape. Every operator that would launch a kernel is counted. Triton's
kernels are counted where the code launches them. With ``--compile`` they are counted in the code that Inductor writes
for CUDA, too. ``--quantize int8`` estimates the step with int8 weights. The time of a kernel follows from the constants
below. They are assumed until ``--floor FLOOR.json``, which bench_floor.py writes, replaces them.
``--measured DECODE.json``, which bench_decode.py writes, shows the measured time of a step beside the expected one.

Copying the drawn tokens to the host is part of the bubble. The model leaves out two things: the kernels that cuBLAS
adds when it splits a sum, and the second and later waves of programs of an attention kernel, which 64 candidates need.
"""

import argparse
import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import transformers
from bench_decode import step_bytes
from inductor_code import Code, compiling_for_cuda
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, MllamaForConditionalGeneration
from triton.runtime.jit import KernelInterface

from llava_cot.engine import fused, linear
from llava_cot.engine.config import EngineConfig
from llava_cot.engine.engine import CUDA_STEPS_PER_LOOK, Engine
from llava_cot.engine.graphs import Shape, StepBuffers
from llava_cot.engine.model import ModelView
from llava_cot.quantize import decoder_matrices, quantization
from llava_cot_kernels import backend
from llava_cot_kernels.backend import available
from llava_cot_kernels.stage_tags import StageTags
from llava_cot_kernels.triton import attention

ROOT = Path(__file__).parents[1]
PAGE_SIZE = 16


@dataclass(frozen=True)
class Card:
    """The speed of a card. All but the peak is ASSUMED. A floor file has the copy bandwidth, the node and the GEMMs."""

    peak_tb_s: float  # memory bandwidth, by the data sheet
    copy_tb_s: float
    node_us: float = 1.7  # a tiny kernel of a graph, from its start to the start of the next
    key_block_us: float = 1.25  # a block of keys in a program of an attention kernel
    sample_us: float = 20.0  # the kernel that draws tokens
    bubble_us: float = 150.0  # the device waits for the host in a step of one candidate
    bubble_us_more: float = 6.5  # and so much more for each further candidate
    gemm_us: dict[tuple[int, int, int], float] = field(default_factory=dict)  # by N, K, M; only those measured


CARDS = {"H100": Card(peak_tb_s=3.35, copy_tb_s=3.0), "H200": Card(peak_tb_s=4.8, copy_tb_s=4.3)}
# ASSUMED: a GEMM of few rows reads a weight matrix of fewer MB than this at that share of the peak.
ACHIEVED = {16: 0.40, 64: 0.70, math.inf: 0.85}

PARTS = ("GEMMs", "tiny kernels", "attention", "image attention", "sampler", "bubble")
PART_OF_KERNEL = {  # the project's own kernels, by their name in Triton or by the op that launches one
    **{"_attend_paged": "attention", "_attend_image": "image attention", "sample": "sampler"},
    **{"_group_queries": "tiny kernels", "_merge": "tiny kernels", "store_kv": "tiny kernels"},
}
ONE_KERNEL = {  # operators that launch one kernel, besides those that torch tags as pointwise
    *(
        "_foreach_add_",
        "_to_copy",
        "any",
        "arange",
        "bmm",
        "cat",
        "copy_",
        "embedding",
        "gather",
        "index",
        "index_copy_",
    ),
    *("index_select", "mean", "scalar_tensor", "stack"),
}
NO_KERNEL = {"_unsafe_view", "empty", "empty_like", "new_empty"}  # and views


class Kernel(NamedTuple):
    """A launch of a kernel."""

    part: str
    name: str
    weight: torch.Tensor | None = None  # of a GEMM, which gives its bytes, N, K and M
    nbytes: int = 0
    shape: tuple[int, int, int] = (0, 0, 0)
    key_blocks: int = 0  # blocks that the longest program of an attention kernel reads in turn


class Trace(TorchDispatchMode):
    """Records the kernels that operators would launch on CUDA. It raises for an operator that it does not know."""

    def __init__(self, keys: dict[str, int]):
        super().__init__()
        self.kernels: list[Kernel] = []
        self.of_op: dict[str, list[Kernel]] = {}  # those of the last call of an op that is written in Triton
        self._keys = keys  # keys that a query sees, by op

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with self:
            found = function.decompose(*args, **kwargs)
        if found is not NotImplemented:
            return found
        name = str(function).split(".")[1]
        if name in ("mm", "few_row_linear"):
            x, weight = args[:2]
            (m, k), n = x.shape, weight.shape[1 if name == "mm" else 0]
            self.kernels.append(Kernel("GEMMs", name, weight=weight, nbytes=weight.nbytes, shape=(n, k, m)))
        elif function.namespace == "llava_cot_kernels_triton":
            return self._launch_noting(name, args)
        elif function.namespace == "llava_cot_kernels":
            self._note(name)
        elif name in ONE_KERNEL or torch.Tag.pointwise in function.tags:
            self.kernels.append(Kernel("tiny kernels", name))
        elif name not in NO_KERNEL and not function.is_view:
            raise ValueError(f"operator must be in a list of benchmarks/step_model.py, got {function}")
        return function(*args, **kwargs)

    def _launch_noting(self, op: str, args: tuple) -> None:
        """Run the op's own Python code, which decides what is launched. Each kernel then records its launch."""
        names = [name for name, found in vars(attention).items() if isinstance(found, KernelInterface)]
        before = len(self.kernels)
        noting: dict[str, Any] = {name: _Noting(partial(self._note, name, self._keys[op])) for name in names}
        with patch.multiple(attention, **noting), self:
            getattr(attention, op)._init_fn(*args)
        self.of_op[op] = self.kernels[before:]

    def _note(self, name: str, keys: int = 0, *_: Any, **constants: Any) -> None:
        if name not in PART_OF_KERNEL:
            raise ValueError(f"kernel must be in PART_OF_KERNEL of benchmarks/step_model.py, got {name}")
        blocks = _key_blocks(keys, constants) if "BLOCK_N" in constants else 0
        self.kernels.append(Kernel(PART_OF_KERNEL[name], name, key_blocks=blocks))


class _Noting:
    """Stands in for a Triton kernel. ``note`` gets the arguments of a launch."""

    def __init__(self, note: Callable[..., None]):
        self.note = note

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self.note


def _key_blocks(keys: int, constants: dict[str, Any]) -> int:
    split = constants["split_keys"] if "split_keys" in constants else constants["IMAGE_SPLIT_KEYS"]
    split = max(split, -(-keys // constants.get("IMAGE_SPLITS", keys)))
    return -(-(keys if constants["WALK"] else min(keys, split)) // constants["BLOCK_N"])


def _on_cuda(op: str, device_type: str) -> tuple[str, ...]:
    """Stands in for ``available``: the back ends of ``op`` on CUDA, with the compiled one even if it is not built."""
    is_native = any(f'm.impl("{op}"' in source.read_text() for source in (ROOT / "csrc" / "cuda").glob("*.cu"))
    return ("native",) if is_native else available(op, "cuda")


def _parts(launch: str, of_op: dict[str, list[Kernel]]) -> list[str]:
    """Return the parts of the kernels that a call in Inductor's code launches."""
    if launch.endswith(".run"):
        return ["tiny kernels"]
    names = launch.split(".")
    if names[0] == "extern_kernels" or names[3:4] == ["few_row_linear"]:
        return ["GEMMs"]
    if names[2] == "llava_cot_kernels_triton":
        return [kernel.part for kernel in of_op[names[3]]]
    if names[2] == "llava_cot_kernels":
        return [PART_OF_KERNEL[names[3]]]
    raise ValueError(f"Inductor's code must launch only Triton's kernels, GEMMs and ops of the project, got {launch}")


@dataclass(frozen=True)
class Step:
    """A decode step of N candidates of one question."""

    candidates: int
    kernels: list[Kernel]
    bytes: dict[str, int]  # bytes that each part must read
    compiled: Counter[str] | None  # nodes of each part, if the step is compiled
    codes: list[Code]  # what it is compiled to

    @classmethod
    def trace(
        cls,
        model: MllamaForConditionalGeneration,
        n: int,
        tiles: int,
        text: int,
        private: int,
        *,
        compile: bool = False,
        fuse: bool = True,
    ) -> "Step":
        """Trace a step of ``model``, which is on the meta device.

        A candidate has ``private`` tokens after a prompt of ``text`` tokens. ``compile`` traces the compiled step too.
        Without ``fuse`` linear layers compute a product each.
        """
        # Without data a part of a buffer is only known by the buffer's storage.
        same = {"alias": lambda part: part}
        may_move = patch.multiple(fused, DEVICES={"meta"}, _may_move=lambda parameter: fuse, **same)
        reads_int8 = patch.object(linear, "INT8_DEVICES", {"meta"})
        rows = patch.dict(linear.MOST_ROWS, meta=linear.MOST_ROWS["cuda"])
        with may_move, reads_int8, rows, patch.object(backend, "available", _on_cuda):
            plain, view = cls._record(model, n, tiles, text, private, compile=False)
            compiled, codes = None, []
            if compile:
                with compiling_for_cuda() as codes:
                    around, _ = cls._record(model, n, tiles, text, private, compile=True)
                compiled = Counter(kernel.part for kernel in around.kernels)
                for code in codes:
                    for name, count in code.launches.items():
                        for part in _parts(name, plain.of_op):
                            compiled[part] += count * code.runs
        weights = step_bytes(model, n, 0, 0, 0)
        with_image = step_bytes(model, n, tiles, 0, 0)
        with_text = step_bytes(model, n, tiles, text, private)
        logits = n * view.vocab_size * model.dtype.itemsize
        sizes = (weights, 0, with_text - with_image, with_image - weights, logits, 0)
        return cls(n, plain.kernels, dict(zip(PARTS, sizes)), compiled, codes)

    @staticmethod
    def _record(
        model: MllamaForConditionalGeneration, n: int, tiles: int, text: int, private: int, *, compile: bool
    ) -> tuple[Trace, ModelView]:
        pages = -(-(text + private) // PAGE_SIZE)
        tags = StageTags([b"a", b"</x>"], ["</x>"])
        config = EngineConfig(PAGE_SIZE, pages, steps_per_look=CUDA_STEPS_PER_LOOK, compile=compile)
        engine = Engine(model, tags, config=config)
        view, window = engine.view, engine.window
        shape = Shape.with_room(n, pages, segments=1, prefixes=int(n > 1))
        buffers = StepBuffers(shape, window.num_steps, window.num_tags, view.device)
        image = view.image_tokens({"cross_attention_mask": torch.ones(1, 1, 1, tiles)})
        trace = Trace({"paged_attention": text + private, "shared_attention": image})
        with torch.inference_mode(), trace:
            window.step(buffers)
        return trace, view

    def nodes(self, compiled: bool) -> Counter[str]:
        """Return the number of graph nodes of each part."""
        if not compiled:
            return Counter(kernel.part for kernel in self.kernels)
        assert self.compiled is not None
        return self.compiled.copy()

    def milliseconds(self, card: Card, compiled: bool) -> dict[str, float]:
        """Return the expected time of each part."""
        us = dict.fromkeys(PARTS, 0.0)
        for kernel in self.kernels:
            if kernel.part == "GEMMs":
                us["GEMMs"] += gemm_us(card, kernel)
            elif kernel.key_blocks:
                us[kernel.part] += card.node_us + kernel.key_blocks * card.key_block_us
        for part in ("attention", "image attention"):
            us[part] = max(us[part], self.bytes[part] / card.copy_tb_s / 1e6)
        us["tiny kernels"] = self.nodes(compiled)["tiny kernels"] * card.node_us
        us["sampler"] = card.sample_us
        us["bubble"] = card.bubble_us + (self.candidates - 1) * card.bubble_us_more
        return {part: value / 1e3 for part, value in us.items()}


def gemm_us(card: Card, kernel: Kernel) -> float:
    """Return the measured time, if need be of more rows, or an estimate from the bytes of the weight."""
    n, k, m = kernel.shape
    measured = [(rows, us) for (*of_weight, rows), us in card.gemm_us.items() if of_weight == [n, k] and rows >= m]
    if measured:
        return min(measured)[1]
    share = next(share for below, share in ACHIEVED.items() if kernel.nbytes < below * 1e6)
    return max(card.node_us, kernel.nbytes / (share * card.peak_tb_s * 1e6))


def measured_milliseconds(row: dict[str, Any]) -> dict[str, float]:
    """Return the time of each part, from a row of bench_decode.py with a profile. Without a profile nothing is known.

    Measured gaps between kernels belong to the bubble. In the estimate they belong to the kernels.
    """
    kernels = row.get("profile", {}).get("microseconds", {})
    ms = dict.fromkeys(PARTS if kernels else (), 0.0)
    for name, us in kernels.items():
        part = next((part for own, part in PART_OF_KERNEL.items() if own in name), "tiny kernels")
        is_gemm = any(word in name.lower() for word in ("gemm", "gemv", "nvjet", "cutlass", "splitk"))
        ms["GEMMs" if is_gemm else part] += us / 1e3
    return ms | {"bubble": row["ms"] - sum(ms.values())} if kernels else ms


def table(header: list[str], rows: list[list[Any]]) -> str:
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (header, ["---"] * len(header), *rows))


def parts_table(step: Step, cards: dict[str, Card], compiled: bool, row: dict[str, Any] | None = None) -> str:
    """Return the table of parts. ``row`` is the measurement of the step, on the only one of ``cards``."""
    nodes, sizes = step.nodes(compiled), dict(step.bytes)
    nodes["total"], sizes["total"] = nodes.total(), sum(sizes.values())
    times = [step.milliseconds(card, compiled) for card in cards.values()]
    times = [ms | {"total": sum(ms.values())} for ms in times]
    measured = measured_milliseconds(row) | {"total": row["ms"]} if row else {}
    lines = []
    for part in (*PARTS, "total"):
        line = [part, f"{sizes[part] / 1e6:,.1f}", f"{nodes[part]:,}", *(f"{ms[part]:.2f}" for ms in times)]
        ratio = [f"{measured[part]:.2f}", f"{measured[part] / times[0][part]:.2f}"] if part in measured else []
        lines.append(line + ratio)
    floors = [f"{sizes['total'] / card.copy_tb_s / 1e9:.2f}" for card in cards.values()]
    lines.append(["all bytes at the copy bandwidth", "", "", *floors])
    header = [*(f"{name}, ms" for name in cards), *["measured, ms", "measured / expected"] * bool(row)]
    return table(["part", "MB", "nodes", *header], lines)


def gemm_table(step: Step, cards: dict[str, Card]) -> str:
    kernels = {kernel.shape: kernel for kernel in step.kernels if kernel.part == "GEMMs"}
    counts = Counter(kernel.shape for kernel in step.kernels)
    lines = []
    for shape, kernel in kernels.items():
        times = [f"{gemm_us(card, kernel):.1f}" for card in cards.values()]
        lines.append([*shape, counts[shape], f"{kernel.nbytes / 1e6:.1f}", *times])
    return table(["N", "K", "M", "in a step", "MB", *(f"{name}, us each" for name in cards)], lines)


def card_in(machine: str) -> str:
    """Return the name of the card in the description of a machine."""
    for name in CARDS:
        if name in machine:
            return name
    raise ValueError(f"figures must be of one of {sorted(CARDS)}, got those of {machine!r}")


def read_floor(path: Path) -> dict[str, Card]:
    """Return the card, updated with the measurements of a floor file."""
    found = json.loads(path.read_text())
    gemms = {(gemm["n"], gemm["k"], gemm["m"]): gemm["us"] for gemm in found["rows"]}
    assumed = CARDS[name := card_in(found["device"])]
    return {name: replace(assumed, copy_tb_s=found["copy_tb_s"], node_us=found["graph_node_us"], gemm_us=gemms)}


def quantize_to_int8(model: MllamaForConditionalGeneration) -> None:
    """Quantise the decoder layers of a model on the meta device as ``quantize="int8"`` does while it loads."""
    from torchao.quantization import quantize_

    chosen = {*decoder_matrices(model).values()}
    config = quantization("int8").config(model.device, model.dtype).quant_type
    quantize_(model, config, filter_fn=lambda module, name: module in chosen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "configs/llama_3_2_11b_vision"), help="a folder with config.json")
    parser.add_argument("--candidates", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--tiles", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--text", type=int, default=600, help="tokens of the prompt")
    parser.add_argument("--private", type=int, default=75, help="tokens of each candidate")
    parser.add_argument("--compile", action="store_true", help="estimate the step with compiled decoder layers too")
    parser.add_argument("--quantize", choices=["int8"], help="the weights of the decoder layers; else bfloat16")
    parser.add_argument("--floor", type=Path, nargs="+", default=[], help="the files of bench_floor.py, one per card")
    parser.add_argument("--measured", type=Path, help="the file of bench_decode.py: steps to compare, and their card")
    parser.add_argument("--profile", type=Path, help="the file of bench_decode.py --profile, for the same steps")
    args = parser.parse_args()
    cards, text, private = dict(CARDS), args.text, args.private
    for path in args.floor:
        cards |= read_floor(path)
    kinds = [False, True] if args.compile else [False]
    asked = [(n, tiles, kind, None) for tiles in args.tiles for n in args.candidates for kind in kinds]
    if args.measured:
        found = json.loads(args.measured.read_text())
        cards = {name: cards[name] for name in [card_in(found["machine"])]}
        text, private = found["settings"]["text"], found["settings"]["tokens"] // 2
        profiled = json.loads(args.profile.read_text())["rows"] if args.profile else []
        profiles = {(row["candidates"], row["tiles"]): {"profile": row["profile"]} for row in profiled}
        asked = [
            (n, tiles, found["settings"]["compile"], row | profiles.get((n, tiles), {}))
            for row in found["rows"]
            if row["ms"]
            for n, tiles in [(row["candidates"], row["tiles"])]
        ]
    with torch.device("meta"):
        settings = AutoConfig.from_pretrained(args.model)
        model = MllamaForConditionalGeneration._from_config(settings, dtype=torch.bfloat16).eval()
    if args.quantize:
        quantize_to_int8(model)
    steps = {
        (n, tiles): Step.trace(model, n, tiles, text, private, compile=any(kind for *_, kind, _ in asked))
        for n, tiles, *_ in asked
    }
    print("# The decode step on paper\n")
    command = f"python benchmarks/step_model.py{' --compile' * args.compile}{' --quantize int8' * bool(args.quantize)}"
    print(f"An ESTIMATE by `{command}`, whose docstring says how; not a measurement of a step.")
    weights = args.quantize or "bfloat16"
    print(f"{text} tokens of prompt, {private} of each candidate, {weights}; the code of torch {torch.__version__} and")
    print(f"transformers {transformers.__version__}. Constants are assumed unless measured:\n")
    print("- a GEMM reads a weight of fewer MB than this at that share of the peak:", ACHIEVED)
    print()
    names = [column.name for column in fields(Card) if column.name != "gemm_us"]
    values = [[name, *(getattr(card, each) for each in names)] for name, card in cards.items()]
    measured = ["copy_tb_s, node_us, GEMMs" if card.gemm_us else "none" for card in cards.values()]
    print(table(["card", *names, "measured"], [[*line, known] for line, known in zip(values, measured)]))
    for step in {n: step for (n, _), step in steps.items()}.values():
        print(f"\n## GEMMs and tiny kernels, candidates: {step.candidates}\n\n{gemm_table(step, cards)}\n")
        tiny = Counter(kernel.name.strip("_") for kernel in step.kernels if kernel.part == "tiny kernels")
        print("Tiny kernels: " + ", ".join(f"{count} {name}" for name, count in tiny.most_common()) + ".")
    for n, tiles, compiled, row in asked:
        print(f"\n## Candidates: {n}, real tiles: {tiles}, {'compiled' if compiled else 'plain'} layers\n")
        if row and "profile" in row:
            print(f"Kernels measured: {row['profile']['kernels']:,.0f} a step.\n")
        print(parts_table(steps[n, tiles], cards, compiled, row))


if __name__ == "__main__":
    main()
