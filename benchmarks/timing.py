"""Code that the kernel benchmarks share: cases with several providers, wall-clock quantiles, tables, plots and JSON.

A benchmark is a file with ``cases(device, report)``. ``main(cases)`` makes it a command, and ``pytest benchmarks/``
runs the same cases under pytest-benchmark. Every provider is checked before any is timed.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from llava_cot.atomic import replacing
from llava_cot.engine.graphs import CudaRecorder

MAX_GROWTH = 0.02  # of the memory of a process that goes on and on
NEEDS_GPU = 77  # the exit code of a benchmark that has no device to run on


class Results:
    """The figures of a benchmark in a JSON file, which is complete after every row, so a stopped run keeps its rows."""

    def __init__(self, path: Path | None, **settings: Any):
        self.path, self.found = path, dict[str, Any](settings, rows=[])
        self._write()

    def add(self, row: dict[str, Any]) -> None:
        self.found["rows"].append(row)
        self._write()

    def _write(self) -> None:
        if self.path:
            with replacing(self.path) as file:
                file.write(json.dumps(self.found, indent=1, default=str) + "\n")


def memory_bytes(field: str, pid: int | str = "self") -> int:
    """Return what Linux tells of a process's memory: "VmRSS" is resident now, and "VmHWM" was at most."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def growth(sizes: list[int]) -> float:
    """Return by how much of itself memory has grown after the first quarter of its readings, the warm-up.

    The median of the last third of the others is compared with that of their first third.
    """
    warm = sizes[max(len(sizes) // 4, min(1, len(sizes) - 1)) :]
    third = max(1, len(warm) // 3)
    return statistics.median(warm[-third:]) / statistics.median(warm[:third]) - 1


def check_device(device: str) -> None:
    """Exit with one line and the code ``NEEDS_GPU`` if ``device`` is a GPU and there is none."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        print(f"{Path(sys.argv[0]).name} needs a GPU: torch.cuda.is_available() is False")
        sys.exit(NEEDS_GPU)


def synchronize(device: torch.device) -> None:
    """Wait until ``device`` has finished its work. On a CPU there is nothing to wait for."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def in_process(script: str, *arguments: str, environ: dict[str, str] | None = None) -> str:
    """Return the last line that ``script`` prints in a fresh process.

    Raises:
        RuntimeError: the script failed; the message is the last line of its stderr.
    """
    run = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, env=environ)
    if run.returncode:
        raise RuntimeError((run.stderr.splitlines() or [f"exit code {run.returncode}"])[-1])
    return run.stdout.splitlines()[-1]


@dataclass(frozen=True)
class Case:
    """One call, as several providers make it."""

    op: str
    name: str
    providers: dict[str, Callable[[], Any]]
    bytes: int  # the least bytes that the call must read and write
    check: Callable[[], None]  # raises AssertionError if a provider's result is wrong
    undo: Callable[[], None] = lambda: None  # not timed, after each call
    on_host: bool = False  # use the host's clock and no turns: a peer's copies would evict the interpreter


@dataclass(frozen=True)
class Quantiles:
    """Quantiles of the wall-clock times of one call, in ms."""

    median: float
    low: float  # 20 %
    high: float  # 80 %

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.low:.3g} to {self.high:.3g})"


def measure(
    calls: dict[str, Callable[[], object]],
    repeats: int,
    device: str = "cpu",
    warmup: int = 3,
    undo: Callable[[], None] = lambda: None,
) -> dict[str, Quantiles]:
    """Time each call ``repeats`` (>= 5) times after ``warmup`` rounds. The calls take turns."""
    if repeats < 5:
        raise ValueError(f"repeats must be >= 5, got {repeats}")
    timed = _time_on_cuda() if device == "cuda" else _time_on_cpu
    turns = _captured(calls) if device == "cuda" else [calls]
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in turns:
        for _ in range(warmup + repeats):
            for name, call in turn.items():
                times[name].append(timed(call))
                undo()
    points = torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)
    found = {name: torch.tensor(of_call[warmup:], dtype=torch.float64) for name, of_call in times.items()}
    return {name: Quantiles(*of_call.quantile(points).tolist()) for name, of_call in found.items()}


def measure_case(case: Case, repeats: int, device: str) -> dict[str, Quantiles]:
    if not case.on_host:
        return measure(case.providers, repeats, device, undo=case.undo)
    return {name: measure({name: call}, repeats, undo=case.undo)[name] for name, call in case.providers.items()}


def _time_on_cpu(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def _time_on_cuda() -> Callable[[Callable[[], object]], float]:
    """Time a call between two events, after a write that evicts the call's data from the L2 cache."""
    flush = torch.empty(512 << 20, dtype=torch.int8, device="cuda")
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def timed(call: Callable[[], object]) -> float:
        flush.zero_()
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    return timed


def _captured(calls: dict[str, Callable[[], object]]) -> list[dict[str, Callable[[], object]]]:
    """Turn calls into CUDA graphs, so that no Python is timed. Calls that wait for the device stay as they are.

    A failed capture would make PyTorch's allocator unusable for the next one. So calls that wait are found beforehand.
    """
    recorder = CudaRecorder(torch.device("cuda", torch.cuda.current_device()))
    graphs, plain = dict[str, Callable[[], object]](), dict[str, Callable[[], object]]()
    for name, call in calls.items():
        if _waits(call):
            print(f"  {name} waits for the device, so it is timed without a graph and includes Python", flush=True)
            plain[name] = call
        else:
            graphs[name] = recorder.capture(call)
    return [graphs, plain]


def _waits(call: Callable[[], object]) -> bool:
    """Return whether the host waits for the device in a warm call."""
    for _ in range(2):  # the first call may wait for compilation or allocation
        call()
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        if "synchronizing" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return False


def copy_bandwidth(device: str, repeats: int = 10) -> float:
    """Measure the bytes a second that ``Tensor.copy_`` reads and writes, for a matrix that fits in no cache."""
    source = torch.ones(64 << 20 if device == "cpu" else 1 << 30, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    figures = measure({"copy": lambda: target.copy_(source)}, repeats, device)
    return 2 * source.numel() / figures["copy"].median * 1e3


def main(cases: Callable[[str, bool], Iterator[Case]], description: str) -> None:
    """Run the command line of a benchmark."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--report", action="store_true", help="run every case; default: only the small ones")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--case", default="", help="run only cases with this text in their op and name")
    parser.add_argument("--only", nargs="+", metavar="PROVIDER", help="time only these")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--plot", type=Path, help="plot the medians to this file (.svg or .png; needs matplotlib)")
    args = parser.parse_args()
    check_device(args.device)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    peak = copy_bandwidth(args.device)
    print(f"{environment(args.device)}; copy bandwidth {peak / 1e9:.1f} GB/s; ms: median (20 % to 80 %)", flush=True)
    results = Results(args.json, machine=environment(args.device), copy_bandwidth=peak, repeats=args.repeats)
    for case in cases(args.device, args.report):
        if args.case not in f"{case.op}, {case.name}":
            continue
        case.check()
        timed = {name: call for name, call in case.providers.items() if not args.only or name in args.only}
        figures = measure_case(replace(case, providers=timed), args.repeats, args.device)
        milliseconds = {name: asdict(quantiles) for name, quantiles in figures.items()}
        results.add({"op": case.op, "case": case.name, "bytes": case.bytes, "ms": milliseconds})
        print(f"\n{case.op}, {case.name}: {case.bytes / 1e6:.3g} MB", flush=True)
        for name, quantiles in figures.items():
            share = f"{case.bytes / (quantiles.median / 1e3) / peak:7.1%} of copy bandwidth" if case.bytes else ""
            print(f"  {name:24} {quantiles!s:34} {share}".rstrip(), flush=True)
    if args.plot:
        _plot(results.found["rows"], args.plot)


def environment(device: str) -> str:
    """Describe the machine and the versions in one line."""
    if device == "cuda":
        hardware = torch.cuda.get_device_name()
    else:
        hardware = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    return f"{hardware}; torch {torch.__version__}; Python {platform.python_version()}"


def _plot(rows: list[dict], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(rows), 1, figsize=(9, 0.6 + 1.1 * len(rows)), layout="constrained", squeeze=False)
    for axis, row in zip(axes[:, 0], rows):
        names = list(row["ms"])
        axis.barh(names, [row["ms"][name]["median"] for name in names])
        axis.set_xscale("log")
        axis.set_title(f"{row['op']}, {row['case']} (ms)", fontsize=9, loc="left")
        axis.tick_params(labelsize=8)
        axis.invert_yaxis()
    figure.savefig(path)
