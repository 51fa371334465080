"""Tensors of several dtypes in one buffer: the host writes them, a step reads and writes them."""

import numpy as np
import pytest
import torch

from llava_cot.engine.packed import ALIGNMENT, Packed

FIELDS = {
    "ends": (torch.bool, (3, 5)),
    "token": (torch.int64, (7,)),
    "nothing": (torch.int32, (0,)),
    "table": (torch.int32, (3, 5)),
    "top_p": (torch.float32, (7,)),
    "step": (torch.int64, (1,)),
}


def fill(packed: Packed) -> dict[str, np.ndarray]:
    """Write other values into every field; returns them."""
    rng, values = np.random.default_rng(0), dict[str, np.ndarray]()
    for name, array in packed.arrays.items():
        values[name] = rng.integers(0, 100, array.shape).astype(array.dtype)
        array[...] = values[name]
    return values


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_one_upload_fills_all(device):
    packed = Packed(FIELDS, torch.device(device))
    assert all(not tensor.any() for tensor in packed.tensors.values())
    values = fill(packed)
    packed.upload()
    for name, tensor in packed.tensors.items():
        assert (tensor.dtype, tuple(tensor.shape), tensor.device.type) == (*FIELDS[name], device)
        assert tensor.data_ptr() % ALIGNMENT == 0
        assert (tensor.cpu().numpy() == values[name]).all(), name


def test_compiled_code_writes_only_what_it_is_told_to():
    """Whatever their dtypes and offsets are, which differ between sizes."""

    def step(token, top_p, index):
        token.add_(index)
        top_p.mul_(2)
        index.add_(1)

    compiled = torch.compile(step, dynamic=True, backend="aot_eager")
    for rows in (4, 16, 9):
        fields = {name: (dtype, (rows,) if shape == (7,) else shape) for name, (dtype, shape) in FIELDS.items()}
        packed = Packed(fields, torch.device("cpu"))
        values = fill(packed)
        compiled(packed.tensors["token"], packed.tensors["top_p"], packed.tensors["step"])
        values["token"] += values["step"]
        values["top_p"] *= 2
        values["step"] += 1
        for name, array in packed.arrays.items():
            assert (array == values[name]).all(), name
