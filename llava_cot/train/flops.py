"""Look up the peak FLOP/s of a GPU, for the model FLOPs utilisation (MFU)."""

import re

import torch

# Dense bfloat16 FLOP/s from the vendors' data sheets. The first pattern that matches the name of the device counts.
PEAK_FLOPS = {
    r"\b(GB|B)(200|300)\b": 2250e12,
    r"\b(H100|H200|H800) NVL\b": 835e12,
    r"\bH(100|800) PCIe\b": 756e12,
    r"\b(GH200|H100|H200|H800)\b": 989e12,
    r"\bH20\b": 148e12,
    r"\bA(100|800)\b": 312e12,
    r"\bL40S\b": 362e12,
    r"\bL40\b": 181e12,
    r"\bL4\b": 121e12,
    r"\bRTX 6000 Ada\b": 364e12,
    r"\bA6000\b": 155e12,
    r"\bA40\b": 150e12,
    r"\bA30\b": 165e12,
    r"\bA10G?\b": 125e12,
    r"\bRTX 4090\b": 165e12,
    r"\bRTX 3090\b": 71e12,
}


def peak_flops(device: torch.device | str) -> float | None:
    """Return the dense bfloat16 FLOP/s of a known NVIDIA GPU, or None for any other device."""
    if torch.device(device).type != "cuda" or not torch.cuda.is_available():
        return None
    return _peak_of(torch.cuda.get_device_name(device))


def _peak_of(name: str) -> float | None:
    return next((peak for pattern, peak in PEAK_FLOPS.items() if re.search(pattern, name)), None)
