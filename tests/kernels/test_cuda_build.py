"""nvcc compiles every CUDA source for every architecture without a warning, and ptxas spills no register."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.fibers import ROOT, STABLE_ABI_2_11
from torch.utils.cpp_extension import include_paths

ARCHITECTURES = {"sm_80": ["-arch=sm_80"], "sm_90a": ["-gencode=arch=compute_90a,code=sm_90a"]}
SOURCES = sorted(ROOT.glob("csrc/cuda/*.cu"))


def compile_source(source: Path, architecture: str, target: Path) -> str:
    """What ptxas -v says, a line per kernel: name, registers, spilled bytes."""
    flags = ["-O3", "-std=c++20", "-fmad=false", "-Xptxas=-v", "-Werror=all-warnings", "-DUSE_CUDA"]
    flags += [f"-DTORCH_TARGET_VERSION={STABLE_ABI_2_11}", f"-I{ROOT / 'csrc'}"]
    flags += [word for path in include_paths() for word in ("-isystem", path)]
    command = ["nvcc", "-c", *ARCHITECTURES[architecture], *flags, str(source), "-o", str(target)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stderr


def report(ptxas: str) -> list[str]:
    kernels = re.findall(r"Compiling entry function '(\w+)'", ptxas)
    demangled = subprocess.run(["c++filt", *kernels], capture_output=True, text=True).stdout.splitlines()
    names = [re.sub(r"llava_cot::|\(anonymous namespace\)::|void |\(.*\)$", "", name) for name in demangled]
    registers = re.findall(r"Used (\d+) registers", ptxas)
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", ptxas)
    # A device function that is not inlined has a frame of its own, without registers: its line would shift the others.
    assert len(kernels) == len(registers) == len(frames), ptxas
    return [
        f"{name}: {count} registers, {frame} bytes of stack, {stores} + {loads} bytes spilled"
        for name, count, (frame, stores, loads) in sorted(zip(names, registers, frames))
    ]


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_compiles_without_warnings_or_spills(source, architecture, tmp_path):
    for line in report(compile_source(source, architecture, tmp_path / "out.o")):
        assert line.endswith(" 0 + 0 bytes spilled"), line


if __name__ == "__main__":  # PYTHONPATH=tests python tests/kernels/test_cuda_build.py > benchmarks/results/ptxas.txt
    for architecture in ARCHITECTURES:
        for source in SOURCES:
            lines = report(compile_source(source, architecture, Path("/dev/null")))
            sys.stdout.write("\n".join([f"{source.relative_to(ROOT)}, {architecture}", *(f"  {x}" for x in lines), ""]))
