"""Argument checks of the public functions. Each error names the argument, what it must be and what it was."""

from collections.abc import Sequence

import torch
from torch.autograd import forward_ad

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
FLOAT32_MAX = torch.finfo(torch.float32).max
INT32_MAX = torch.iinfo(torch.int32).max
USE_REFERENCE = 'use backend="reference", which has one'  # what a caller can do where a gradient would be lost
Named = Sequence[tuple[str, torch.Tensor]]


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
        if tensor.layout != torch.strided:
            raise TypeError(f"{name} must have layout torch.strided, got {tensor.layout}")
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


def check_finite(name: str, value: float) -> float:
    """Check that ``value`` is a number that float32 can hold, and return it as a float."""
    if not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not abs(value) <= FLOAT32_MAX:
        raise ValueError(f"{name} must be finite in float32, got {value}")
    return float(value)


def check_window(name: str, value: int) -> int:
    """Check that ``value`` is a number of tokens, and return it as an int that 32 bits can hold, as a length."""
    if not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < 0:
        raise ValueError(f"{name} must be >= 0, got {value}")
    return min(int(value), INT32_MAX)


def check_no_gradient(op: str, tensors: Named, instead: str) -> None:
    """Check that no tensor needs a gradient, which would silently be lost because ``op`` has no backward.

    A tensor of forward mode has a tangent instead of ``requires_grad``. ``instead`` says what the caller can use.
    """
    is_recorded = torch.is_grad_enabled()
    may_have_tangent = not (torch.compiler.is_compiling() or torch.is_inference_mode_enabled())
    if not is_recorded and not may_have_tangent:
        return
    for name, tensor in tensors:
        if is_recorded and tensor.requires_grad:
            raise ValueError(f"{name} must not require grad, since {op} has no backward: {instead}, or torch.no_grad()")
        if may_have_tangent and forward_ad.unpack_dual(tensor).tangent is not None:
            raise ValueError(f"{name} must not have a tangent, since {op} has no forward derivative: {instead}")


def check_writable(name: str, tensor: torch.Tensor) -> None:
    """Check that a tensor is none that autograd forbids to write in place, as PyTorch's own operators do."""
    if torch.is_grad_enabled() and tensor.requires_grad and (tensor if tensor._base is None else tensor._base).is_leaf:
        raise ValueError(
            f"{name} must not be a leaf that requires grad or a view of one, since it is written in place: use "
            f"{name}.detach(), or torch.no_grad()"
        )


def check_apart(written: Named, read: Named) -> None:
    """Check that the tensors that an op writes share no memory with each other or with those that it reads.

    It compares the first and last address of each, so it takes views that interleave for overlapping ones. In a graph
    that is being compiled there are no addresses.
    """
    if torch.compiler.is_compiling():
        return
    spans = [(name, *_span(tensor)) for name, tensor in (*written, *read)]
    for i, (name, begin, end) in enumerate(spans[: len(written)]):
        for other, other_begin, other_end in spans[i + 1 :]:
            if begin < other_end and other_begin < end:
                raise ValueError(f"{name} must not share memory with {other}, since it is written in place")


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """Return the address of a tensor's first byte and the one after its last, or (0, 0) if it has no memory."""
    try:
        begin = tensor.data_ptr()
    except RuntimeError:  # a wrapper of torch.func
        return 0, 0
    if not begin or tensor.is_contiguous():  # one without elements or on the meta device is at 0
        return begin, begin and begin + tensor.nbytes
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return begin, begin + (last + 1) * tensor.itemsize


def check_distinct(name: str, tensor: torch.Tensor) -> None:
    """Check that no two elements of a tensor that is written are the same memory, as those of ``expand`` are."""
    reach = 0  # of the dimensions with smaller strides, in elements
    for stride, size in sorted(zip(tensor.stride(), tensor.shape)):
        if size > 1 and stride <= reach and tensor.numel():
            raise ValueError(
                f"{name} must not overlap itself, got shape {list(tensor.shape)} with strides {tensor.stride()}"
            )
        reach += (size - 1) * stride


def note_writes(*tensors: torch.Tensor) -> None:
    """Tell autograd that a compiled op wrote into tensors, so that a backward that saved one of them raises.

    In a graph that is being compiled the schema of the op says it.
    """
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(tensors)
