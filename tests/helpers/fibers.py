"""The host build of the CUDA kernels (tests/fibers), and what it counts."""

import ctypes
import fcntl
import hashlib
import subprocess
import sysconfig
import tempfile
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.utils.cpp_extension import include_paths, library_paths

ROOT = Path(__file__).parents[2]
STABLE_ABI_2_11 = "0x020b000000000000"


class _Counters(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("launches", "bytes_read", "bytes_written")]


@cache
def ops():
    """``torch.ops.llava_cot_kernels_fibers``: the CUDA ops on CPU tensors; compiled when the sources have changed."""
    torch.ops.load_library(_library())
    return torch.ops.llava_cot_kernels_fibers


@contextmanager
def counting():
    """Launches, and bytes of global memory read and written, inside the block."""
    counters = _functions().llava_cot_fibers_counters().contents
    for name, _ in _Counters._fields_:
        setattr(counters, name, 0)
    counted = SimpleNamespace()
    yield counted
    for name, _ in _Counters._fields_:
        setattr(counted, name, getattr(counters, name))


@contextmanager
def order(seed: int):
    """Runs threads and blocks in an order shuffled by ``seed`` instead of as they are numbered."""
    _functions().llava_cot_fibers_set_order(ctypes.c_uint64(seed))
    try:
        yield
    finally:
        _functions().llava_cot_fibers_set_order(ctypes.c_uint64(0))


@contextmanager
def limits(num_multiprocessors: int = 132, max_team_size: int = 8, max_shared_bytes: int = 227 * 1024):
    """What launches find the device to have; an H200 has the defaults."""
    _functions().llava_cot_fibers_set_limits(num_multiprocessors, max_team_size, ctypes.c_int64(max_shared_bytes))
    try:
        yield
    finally:
        _functions().llava_cot_fibers_set_limits(132, 8, ctypes.c_int64(227 * 1024))


@cache
def _functions() -> ctypes.CDLL:
    ops()
    library = ctypes.CDLL(str(_library()))
    library.llava_cot_fibers_counters.restype = ctypes.POINTER(_Counters)
    return library


@cache
def _library() -> Path:
    sources = [
        *sorted(ROOT.glob("csrc/cuda/*.cu")),
        ROOT / "csrc/bindings.cpp",
        *sorted(ROOT.glob("tests/fibers/*.cpp")),
    ]
    headers = [*ROOT.glob("csrc/*.h"), *ROOT.glob("csrc/cuda/*.*h"), *ROOT.glob("tests/fibers/*.h")]
    content = b"".join(path.read_bytes() for path in [*sources, *sorted(headers)])
    key = hashlib.sha256(content + torch.__version__.encode()).hexdigest()[:16]
    folder = ROOT / "build" / "fibers"
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / f"fibers-{key}{sysconfig.get_config_var('EXT_SUFFIX')}"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # or each of several test processes would compile it
        if not library.exists():
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                _compile(sources, Path(scratch)).rename(library)
    return library


def _compile(sources: list[Path], scratch: Path) -> Path:
    flags = ["-O2", "-g", "-std=c++20", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter"]
    flags += ["-Wno-unknown-pragmas", "-ffp-contract=off", "-DLLAVA_COT_FIBERS"]
    flags += [f"-DTORCH_TARGET_VERSION={STABLE_ABI_2_11}", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests/fibers'}"]
    flags += [word for path in include_paths() for word in ("-isystem", path)]
    unit = one_unit(sources, scratch / "fibers.cpp")
    library = scratch / "fibers.so"
    torch_libraries = [word for path in library_paths() for word in (f"-L{path}", f"-Wl,-rpath,{path}")]
    command = ["g++", *flags, "-shared", str(unit), "-o", str(library), *torch_libraries, "-ltorch_cpu", "-ltorch"]
    if subprocess.run(command).returncode:
        raise RuntimeError("the host build of csrc/cuda failed; the compiler's messages are above")
    return library


def one_unit(sources: list[Path], target: Path) -> Path:
    """Write a source that includes all of ``sources``: compilers spend most of their time in the headers of torch."""
    target.write_text("".join(f'#include "{source}"\n' for source in sources))
    return target
