"""The native ops on the GPU for tests that hold CPU tensors: each goes there, with its strides, and comes back."""

import torch

from llava_cot_kernels.backend import OPS


class OnCuda:
    """Looks like a namespace of ``torch.ops``."""

    def __init__(self, namespace=OPS["native"]):
        self._namespace = namespace

    def __getattr__(self, name: str):
        op = getattr(self._namespace, name)

        def call(*arguments):
            moved = [_to_cuda(a) if isinstance(a, torch.Tensor) else a for a in arguments]
            op(*moved)
            for argument, result in zip(arguments, moved):
                if isinstance(argument, torch.Tensor) and argument.numel():
                    argument.detach().copy_(result)

        return call


def _to_cuda(tensor: torch.Tensor) -> torch.Tensor:
    storage = tensor.detach().untyped_storage().cuda()
    on_cuda = torch.empty(0, dtype=tensor.dtype, device="cuda")
    return on_cuda.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())
