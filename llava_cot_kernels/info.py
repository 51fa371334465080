"""Print what was built and which back end each op uses: ``python -m llava_cot_kernels.info``."""

import platform
import sys
from typing import Any

import torch

from llava_cot_kernels import _C, __version__
from llava_cot_kernels.backend import available

OPS = (
    "store_kv",
    "copy_pages",
    "paged_attention",
    "shared_attention",
    "few_row_linear",
    "sample",
    "token_logprobs",
    "linear_logprobs",
)
DEVICE_TYPES = ("cpu", "cuda")


def info() -> dict[str, Any]:
    """Return versions, the extension, threads, CUDA devices and the back ends of each op.

    Back ends are listed by device type. The first is the one that "auto" uses.
    """
    return {
        "versions": {"llava-cot": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "extension": {
            "file": _C.__file__,
            "target_abi": _target_abi(getattr(_C, "TARGET_ABI", None)),
            "instruction_set": _C.isa(),
        },
        "threads": torch.get_num_threads(),
        "cuda_devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "backends": {op: {device: list(available(op, device)) for device in DEVICE_TYPES} for op in OPS},
    }


def render(found: dict[str, Any]) -> str:
    """Format ``info()`` as text. A cell of the table shows what "auto" uses, and the other choices in brackets."""
    extension = found["extension"]
    lines = [
        *(f"{name:16} {text}" for name, text in found["versions"].items()),
        f"{'extension':16} {extension['file']}",
        f"{'target ABI':16} {extension['target_abi']}",
        f"{'instruction set':16} {extension['instruction_set']}",
        f"{'threads':16} {found['threads']}",
        f"{'CUDA':16} {', '.join(found['cuda_devices']) or 'no device'}",
        "",
        f"{'op':18}" + "".join(f"{device:24}" for device in DEVICE_TYPES),
    ]
    for op, devices in found["backends"].items():
        lines.append(f"{op:18}" + "".join(f"{_cell(devices[device]):24}" for device in DEVICE_TYPES))
    return "\n".join(line.rstrip() for line in lines)


def _cell(choices: list[str]) -> str:
    return choices[0] + (f" ({', '.join(choices[1:])})" if choices[1:] else "")


def _target_abi(target: int | None) -> str:
    """Return the oldest LibTorch that the extension runs on: 0x020b000000000000 is 2.11."""
    return "unknown" if target is None else f"LibTorch {target >> 56}.{target >> 48 & 0xFF}"


if __name__ == "__main__":
    sys.stdout.write(render(info()) + "\n")
