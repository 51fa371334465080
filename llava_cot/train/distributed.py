"""The process group of a run, from the variables of torchrun or with a single process."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist


@contextmanager
def process_group(device: str) -> Iterator[torch.device]:
    """Join the group for the block, and yield the device of this rank. ``device`` is auto, cpu or cuda."""
    kind = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    place: dict[str, Any] = {}
    if "RANK" not in os.environ:
        place = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if kind == "cuda":
        torch.cuda.set_device(local_rank)
        dist.init_process_group("cpu:gloo,cuda:nccl", **place, device_id=torch.device("cuda", local_rank))
    else:
        dist.init_process_group("gloo", **place)
    try:
        yield torch.device("cuda", local_rank) if kind == "cuda" else torch.device("cpu")
    finally:
        dist.destroy_process_group()


@contextmanager
def rank_0_first() -> Iterator[None]:
    """Let rank 0 run the block before the others, which then find its results in the cache."""
    if dist.get_rank() != 0:
        dist.barrier()
    yield
    if dist.get_rank() == 0:
        dist.barrier()
