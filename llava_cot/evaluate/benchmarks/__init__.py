"""The benchmarks, one class each."""

from pathlib import Path

from llava_cot.evaluate.benchmark import Benchmark
from llava_cot.evaluate.benchmarks.ai2d import AI2D, AI2DUnmasked
from llava_cot.evaluate.benchmarks.custom import Custom
from llava_cot.evaluate.benchmarks.hallusionbench import HallusionBench
from llava_cot.evaluate.benchmarks.mathvista import MathVista
from llava_cot.evaluate.benchmarks.mmbench import MMBench
from llava_cot.evaluate.benchmarks.mmstar import MMStar
from llava_cot.evaluate.benchmarks.mmvet import MMVet
from llava_cot.evaluate.benchmarks.world import World

BENCHMARKS: dict[str, type[Benchmark]] = {
    benchmark.name: benchmark
    for benchmark in (MMStar, MMBench, MMVet, MathVista, AI2D, AI2DUnmasked, HallusionBench, World, Custom)
}


def benchmark_class(name: str) -> type[Benchmark]:
    """Return the class of a benchmark by its name; case and ``-`` or ``_`` do not matter.

    Raises:
        ValueError: there is no such benchmark.
    """
    found = {key.replace("-", "").replace("_", ""): value for key, value in BENCHMARKS.items()}
    plain = name.lower().replace("-", "").replace("_", "")
    if plain not in found:
        raise ValueError(f"benchmark must be one of {list(BENCHMARKS)}, got {name!r}")
    return found[plain]


def open_benchmark(name: str, path: Path | str | None = None, *, allow_partial: bool = False) -> Benchmark:
    """Open a benchmark's file and check it. ``allow_partial`` accepts one with fewer rows than were published.

    Raises:
        ValueError: there is no such benchmark, or the file is not one of it. The message names the row.
    """
    return benchmark_class(name)(path, allow_partial=allow_partial)
