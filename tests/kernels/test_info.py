"""`python -m llava_cot_kernels.info` says what was built and what each op uses."""

import subprocess
import sys

import pytest
import torch

from llava_cot_kernels import _C
from llava_cot_kernels import info as info_module
from llava_cot_kernels.info import OPS, info, render


def test_command_prints_what_info_finds():
    result = subprocess.run(
        [sys.executable, "-m", "llava_cot_kernels.info"], capture_output=True, text=True, check=True
    )
    assert result.stderr == ""
    lines = {line.split()[0]: line for line in result.stdout.splitlines() if line}
    assert torch.__version__ in lines["torch"]
    assert _C.__file__ in lines["extension"]
    for op in OPS:
        assert lines[op].split()[1] == info()["backends"][op]["cpu"][0]


def test_every_op_exists_and_has_its_backends():
    found = info()
    for op in OPS:
        assert hasattr(torch.ops.llava_cot_kernels, op)
        for device in ("cpu", "cuda"):
            assert found["backends"][op][device][-1] == "reference"
    assert found["backends"]["token_logprobs"]["cpu"] == ["native", "reference"]
    assert found["threads"] == torch.get_num_threads()
    assert len(found["cuda_devices"]) == torch.cuda.device_count()


def test_render_shows_the_choice_of_auto_first():
    found = info()
    found["backends"] = {"sample": {"cpu": ["native", "reference"], "cuda": ["reference"]}}
    found["cuda_devices"] = ["Some GPU"]
    text = render(found)
    assert text.splitlines()[-1].split() == ["sample", "native", "(reference)", "reference"]
    assert "Some GPU" in text


@pytest.mark.parametrize("target, expected", [(0x020B000000000000, "LibTorch 2.11"), (None, "unknown")])
def test_target_abi(target, expected):
    assert info_module._target_abi(target) == expected


def test_instruction_set_is_what_torch_sees(isa_of_run):
    chosen = info()["extension"]["instruction_set"]
    assert chosen == isa_of_run
    capability = torch.backends.cpu.get_cpu_capability()
    assert chosen.removesuffix("_bf16") == {"AVX512": "avx512", "AVX2": "avx2"}.get(capability, chosen)
