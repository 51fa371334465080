"""Builds ``llava_cot_kernels._C`` against the torch of the environment, with and without build isolation."""

import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from setuptools import setup

if find_spec("torch") is None:  # build isolation hides the environment's packages, not where they are
    sys.path += [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    if find_spec("torch") is None:
        raise SystemExit("llava-cot is built against the torch it will run on: install torch >= 2.11 first")

import pybind11
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = Path(__file__).parent
STABLE_ABI_2_11 = "0x020b000000000000"

extension = CppExtension(
    "llava_cot_kernels._C",
    [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("csrc/**/*.cpp"))],
    include_dirs=[str(ROOT / "csrc"), pybind11.get_include()],
    define_macros=[("TORCH_TARGET_VERSION", STABLE_ABI_2_11)],
    extra_compile_args=[
        "-O3",
        "-std=c++20",
        "-fopenmp-simd",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-fvisibility=hidden",
        "-Wall",
        "-Wextra",
        "-Wno-unused-parameter",
        "-Wno-unknown-pragmas",
    ],
)
setup(
    ext_modules=[extension],
    cmdclass={"build_ext": BuildExtension.with_options(use_ninja=find_spec("ninja") is not None)},
)
