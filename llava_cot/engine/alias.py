"""The same memory as another tensor, which nothing knows to be the same."""

import torch
import torch.utils.dlpack


def alias(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of ``tensor`` as a tensor with a storage of its own.

    Of tensors in one storage, one of which is written, a compiler takes all for parts of one, at the offsets that they
    had when it compiled (torch 2.11 to 2.13). It refuses to write to one of several that have different dtypes.
    """
    return torch.from_dlpack(torch.utils.dlpack.to_dlpack(tensor))
