"""Wrap a model in activation checkpoints and FSDP2: a unit for each layer, the embedding, the head and the root."""

from collections import Counter

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from llava_cot.train.config import Precision, Sharding


def checkpoint_activations(model: nn.Module) -> None:
    """Keep only the input of each layer and recompute the rest. Vision layers are included, unlike in transformers."""
    layers = _layer_classes(model)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__ in layers:
                setattr(parent, name, checkpoint_wrapper(child))


def _layer_classes(root: nn.Module) -> set[str]:
    """The names of the classes that transformers never splits over devices: the layers of text and vision."""
    return {name for module in root.modules() for name in getattr(module, "_no_split_modules", None) or ()}


def build_mesh(device: torch.device, replicas: int) -> DeviceMesh:
    """Arrange the ranks as [shard], or as [replicate, shard]."""
    world_size = dist.get_world_size()
    if world_size % replicas:
        raise ValueError(f"sharding.replicas must divide world_size={world_size}, got {replicas}")
    if replicas == 1:
        return init_device_mesh(device.type, (world_size,), mesh_dim_names=("shard",))
    shape = (replicas, world_size // replicas)
    return init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))


def shard(root: nn.Module, mesh: DeviceMesh, precision: Precision, sharding: Sharding) -> None:
    """Make ``root``, on the meta device, an FSDP2 module.

    ``root`` must be the module that is called: FSDP2 takes the first module whose forward runs as its root.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=getattr(torch, precision.compute), reduce_dtype=getattr(torch, precision.reduce)
    )
    # With one rank a shard is the whole parameter, and freeing it would only cost copies.
    reshard = sharding.reshard_after_forward and dist.get_world_size() > sharding.replicas
    layers, heads = _layer_classes(root), ("lm_head", "head", "embed_tokens")
    users = Counter(id(parameter) for _, parameter in root.named_parameters(remove_duplicate=False))
    units = [
        module
        for name, module in root.named_modules()
        if type(module).__name__ in layers
        # A weight that embedding and head share must be in one unit, which is the root.
        or (name.rsplit(".", 1)[-1] in heads and all(users[id(parameter)] == 1 for parameter in module.parameters()))
    ]
    for module in units:
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    fully_shard(root, mesh=mesh, mp_policy=policy, reshard_after_forward=False)


def fill(root: nn.Module, device: torch.device, whole: nn.Module | None) -> None:
    """Fill a sharded ``root`` on the meta device with the weights and buffers of ``whole``, which rank 0 has."""
    buffers = {} if whole is None else dict(whole.named_buffers())
    root.to_empty(device=device)
    for name, buffer in root.named_buffers():  # including those in no state dict: the rotary frequencies
        if whole is not None:
            buffer.copy_(buffers[name.replace("_checkpoint_wrapped_module.", "")])
        dist.broadcast(buffer, src=0)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(root, {} if whole is None else whole.state_dict(), options=options)
