"""Tensors of several dtypes in one buffer, which the host fills and uploads with one copy."""

import math
from collections.abc import Mapping

import numpy as np
import torch

from llava_cot.engine.alias import alias

ALIGNMENT = 64  # bytes: kernels read several values at once


class Packed:
    """Named tensors on ``device``, and arrays of the same names that the host writes.

    On the CPU both are the same memory, and nothing is copied. For CUDA the host writes pinned memory.

    Args:
        fields: the dtype and the shape of each tensor. All begin as zeros.
    """

    def __init__(self, fields: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], device: torch.device) -> None:
        places, end = dict[str, slice](), 0
        for name, (dtype, shape) in fields.items():
            start = -(-end // ALIGNMENT) * ALIGNMENT
            end = start + math.prod(shape) * dtype.itemsize
            places[name] = slice(start, end)

        def views(of: torch.Tensor) -> dict[str, torch.Tensor]:
            return {name: of[places[name]].view(dtype).view(shape) for name, (dtype, shape) in fields.items()}

        self._on_device = torch.zeros(end, dtype=torch.uint8, device=device)
        self._on_host = self._on_device if device.type == "cpu" else torch.zeros(end, dtype=torch.uint8)
        if device.type == "cuda":
            self._on_host = self._on_host.pin_memory()
        self.tensors, self.host_tensors = views(self._on_device), views(self._on_host)
        if device.type != "meta":
            self.tensors = {name: alias(each) for name, each in self.tensors.items()}
        self.arrays: dict[str, np.ndarray] = {name: each.numpy() for name, each in self.host_tensors.items()}

    def upload(self) -> None:
        """Copy what the host has written to the device. It must not write again before the copy has been made."""
        if self._on_host is not self._on_device:
            self._on_device.copy_(self._on_host, non_blocking=True)
