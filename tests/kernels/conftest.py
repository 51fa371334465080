import pytest
import torch
from helpers import fibers
from helpers.on_cuda import OnCuda

from llava_cot_kernels import _C
from llava_cot_kernels.backend import OPS


@pytest.fixture(scope="session")
def isa_of_run(request):
    """The instruction set of the CPU kernels: what ``--isa`` says, or the best that there is."""
    return request.config.getoption("isa") or _C.available_isas()[0]


@pytest.fixture(params=["reference", "native", "fibers"] + ["cuda"] * torch.cuda.is_available())
def backend(request, monkeypatch):
    """The name of a back end. "native" comes as the C++ for the CPU, and as the CUDA sources: on fibers, and on a GPU
    where there is one."""
    if request.param == "fibers":
        monkeypatch.setitem(OPS, "native", fibers.ops())
    elif request.param == "cuda":
        monkeypatch.setitem(OPS, "native", OnCuda())
    return "reference" if request.param == "reference" else "native"
