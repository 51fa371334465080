"""Builds ``llava_cot_kernels._C`` against the torch of the environment, with and without build isolation.

Without torch there is nothing to build it against, and nothing that would use it: the package is installed without it.

The CUDA kernels come with it where that torch is a CUDA build and nvcc is found; TORCH_CUDA_ARCH_LIST chooses the
architectures, which otherwise are 8.0 and 9.0, and PTX for later ones.
"""

import os
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from setuptools import setup

if find_spec("torch") is None:  # build isolation hides the environment's packages, not where they are
    sys.path += [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    if find_spec("torch") is None:
        print("There is no torch here, so the kernels are not built: llava-cot will search on servers alone.")
        setup()
        raise SystemExit
if find_spec("pybind11") is None:
    raise SystemExit("llava-cot is built without build isolation here, which needs pybind11: pip install pybind11")

import pybind11
import torch
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

ROOT = Path(__file__).parent
STABLE_ABI_2_11 = "0x020b000000000000"
CXX_FLAGS = [
    "-O3",
    "-std=c++20",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wno-unused-parameter",
    "-Wno-unknown-pragmas",
]
# No fused multiply-add: a draw must round as it does on the CPU.
NVCC_FLAGS = ["-O3", "-std=c++20", "-fmad=false", "-Xcompiler=-fvisibility=hidden", "-lineinfo"]

with_cuda = torch.version.cuda is not None and CUDA_HOME is not None
if with_cuda:
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
patterns = ["csrc/**/*.cpp", *["csrc/cuda/*.cu"] * with_cuda]
extension = (CUDAExtension if with_cuda else CppExtension)(
    "llava_cot_kernels._C",
    sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern)),
    include_dirs=[str(ROOT / "csrc"), pybind11.get_include()],
    depends=sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.*h")),
    define_macros=[("TORCH_TARGET_VERSION", STABLE_ABI_2_11), *[("USE_CUDA", None)] * with_cuda],
    extra_compile_args={"cxx": CXX_FLAGS, "nvcc": NVCC_FLAGS},
)
setup(
    ext_modules=[extension],
    cmdclass={"build_ext": BuildExtension.with_options(use_ninja=find_spec("ninja") is not None)},
)
