"""What the benchmarks share: wall-clock quantiles, and the table that shows providers side by side."""

import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Quantiles:
    """Of the wall-clock times of one call, in ms."""

    median: float
    low: float  # 20 %
    high: float  # 80 %

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.low:.3g} to {self.high:.3g})"


def measure(fn: Callable[[], object], repeats: int = 20, warmup: int = 3) -> Quantiles:
    """Time ``fn`` ``repeats`` (>= 10) times, after ``warmup`` untimed calls; a CUDA call is waited for."""
    if repeats < 10:
        raise ValueError(f"repeats must be >= 10, got {repeats}")
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    times = []
    for index in range(warmup + repeats):
        synchronize()
        start = time.perf_counter()
        fn()
        synchronize()
        if index >= warmup:
            times.append((time.perf_counter() - start) * 1e3)
    low, median, high = torch.tensor(times).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
    return Quantiles(median, low, high)


def environment() -> str:
    """One line that says what a table was measured on."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        device = f"{_cpu_name()}, {torch.get_num_threads()} threads"
    return (
        f"{device}; torch {torch.__version__}; Python {platform.python_version()}; ms per call: median (20 % to 80 %)"
    )


def table(title: str, providers: Sequence[str], rows: Sequence[tuple[str, Sequence[Quantiles]]]) -> str:
    """A markdown table; the last column is the first provider's median over the last one's."""
    lines = [f"| {title} | {' | '.join(providers)} | {providers[0]} / {providers[-1]} |"]
    lines.append("|" + " --- |" * (len(providers) + 2))
    for name, cells in rows:
        ratio = cells[0].median / cells[-1].median
        lines.append(f"| {name} | {' | '.join(map(str, cells))} | {ratio:.2f} |")
    return "\n".join(lines)


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as cpuinfo:
            return next(line.split(":", 1)[1].strip() for line in cpuinfo if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
