"""nvcc compiles every CUDA source for every architecture without a warning, and ptxas spills no register."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.fibers import ROOT, STABLE_ABI_2_11, one_unit
from torch.utils.cpp_extension import include_paths

ARCHITECTURES = ("80", "90a")
SOURCES = sorted(ROOT.glob("csrc/cuda/*.cu"))


def compile_source(source: Path, target: Path) -> str:
    """Compile for all architectures at once, which share the pass for the host, and return what ptxas -v says."""
    flags = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in ARCHITECTURES]
    flags += ["-O3", "-std=c++20", "-fmad=false", "-Xptxas=-v", "-Werror=all-warnings", "-DUSE_CUDA"]
    flags += [f"-DTORCH_TARGET_VERSION={STABLE_ABI_2_11}", f"-I{ROOT / 'csrc'}"]
    flags += [word for path in include_paths() for word in ("-isystem", path)]
    command = ["nvcc", "-c", *flags, str(source), "-o", str(target)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stderr


def report(ptxas: str) -> dict[str, list[str]]:
    """A line per kernel of each architecture: name, registers, bytes of stack, spilled bytes."""
    kernels = re.findall(r"Compiling entry function '(\w+)' for '(\w+)'", ptxas)
    symbols = [symbol for symbol, _ in kernels]
    demangled = subprocess.run(["c++filt", *symbols], capture_output=True, text=True).stdout.splitlines()
    names = [re.sub(r"llava_cot::|\(anonymous namespace\)::|void |\(.*\)$", "", name) for name in demangled]
    registers = re.findall(r"Used (\d+) registers", ptxas)
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", ptxas)
    # A device function that is not inlined has a frame of its own, without registers: its line would shift the others.
    assert len(kernels) == len(registers) == len(frames), ptxas
    lines = {f"sm_{number}": [] for number in ARCHITECTURES}
    for (_, architecture), name, count, (frame, stores, loads) in zip(kernels, names, registers, frames):
        spills = f"{frame} bytes of stack, {stores} + {loads} bytes spilled"
        lines[architecture].append((name, count, f"{name}: {count} registers, {spills}"))
    return {architecture: [line for *_, line in sorted(found)] for architecture, found in lines.items()}


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
def test_compiles_without_warnings_or_spills(tmp_path):
    reports = report(compile_source(one_unit(SOURCES, tmp_path / "all.cu"), tmp_path / "out.o"))
    assert len(set(map(len, reports.values()))) == 1 and all(reports.values()), "the architectures differ in kernels"
    for architecture, lines in reports.items():
        for line in lines:
            assert line.endswith(" 0 + 0 bytes spilled"), f"{architecture}: {line}"


if __name__ == "__main__":  # PYTHONPATH=tests python tests/kernels/test_cuda_build.py > benchmarks/results/ptxas.txt
    reports = {source.relative_to(ROOT): report(compile_source(source, Path("/dev/null"))) for source in SOURCES}
    for architecture in next(iter(reports.values())):
        for source, lines in reports.items():
            body = [f"  {line}" for line in lines[architecture]]
            sys.stdout.write("\n".join([f"{source}, {architecture}", *body, ""]))
