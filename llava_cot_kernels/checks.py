"""Argument checks of the public functions. Each error names the argument, what it must be and what it was."""

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class Sizes:
    """Named sizes that several tensors share. The first tensor that has a name binds its size.

    >>> sizes = Sizes()
    >>> sizes.check("key", key, "T Hkv D", FLOATS)
    >>> sizes.check("value", value, "T Hkv D", key.dtype)   # ValueError: value must have T=12 in dimension 0, got 10
    """

    def __init__(self, **bound: int) -> None:
        self._bound = bound

    def __getitem__(self, name: str) -> int:
        return self._bound[name]

    def check(
        self,
        name: str,
        tensor: torch.Tensor,
        dims: str,
        dtype: torch.dtype | tuple[torch.dtype, ...],
        device: torch.device | None = None,
    ) -> None:
        """Check type, dtype, shape and device of ``tensor``.

        ``dims`` has one word per dimension: a name to bind or compare, a number, or ``_`` for any size.
        """
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} must be a tensor [{dims.replace(' ', ', ')}], got {type(tensor).__name__}")
        dtypes = dtype if isinstance(dtype, tuple) else (dtype,)
        if tensor.dtype not in dtypes:
            expected = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
            raise TypeError(f"{name} must be {expected}, got {str(tensor.dtype).removeprefix('torch.')}")
        words = dims.split()
        if tensor.dim() != len(words):
            raise ValueError(f"{name} must have shape [{', '.join(words)}], got {list(tensor.shape)}")
        for axis, (word, size) in enumerate(zip(words, tensor.shape)):
            if word == "_":
                continue
            expected_size = int(word) if word.isdigit() else self._bound.setdefault(word, size)
            if size != expected_size:
                shown = word if word.isdigit() else f"{word}={expected_size}"
                raise ValueError(f"{name} must have {shown} in dimension {axis}, got {size}")
        if device is not None and tensor.device != device:
            raise ValueError(f"{name} must be on {device}, got {tensor.device}")


def check_last_dim_contiguous(name: str, tensor: torch.Tensor) -> None:
    """Accept views into a bigger tensor as long as the innermost vectors are dense."""
    if tensor.numel() and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"{name} must have stride 1 in its last dimension, got strides {tensor.stride()}")


def check_contiguous(name: str, tensor: torch.Tensor) -> None:
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got shape {list(tensor.shape)} with strides {tensor.stride()}")


def can_read(tensor: torch.Tensor) -> bool:
    """Return whether values can be read for free.

    On a device a read would wait for the device, and in a graph that is being compiled there are no values.
    """
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def check_range(name: str, tensor: torch.Tensor, low: int, high: int) -> None:
    """Check that all values are in ``[low, high]``, if they can be read for free."""
    if not can_read(tensor) or not tensor.numel():
        return
    smallest, largest = (int(bound) for bound in torch.aminmax(tensor))
    if smallest < low or largest > high:
        raise ValueError(f"{name} must be in [{low}, {high}], got {smallest if smallest < low else largest}")
