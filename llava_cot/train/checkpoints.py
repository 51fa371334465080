"""Checkpoints of a training run: written while training continues, complete or absent, with a bit-exact resume."""

import pickle
import random
import re
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


class Checkpoints:
    """The checkpoints ``folder/step-N`` of one run, each a folder of ``torch.distributed.checkpoint``.

    A checkpoint holds parameters and buffers, optimizer, scheduler, the random states of every rank (Python, numpy,
    torch on CPU and CUDA) and ``extra``. It is written as ``.step-N.part`` and renamed when every rank has written. So
    every ``step-N`` is complete after a crash, and leftovers are removed at the next start. All ranks must see the
    folder. You must trust it, because loading unpickles. All ranks call every method in the same order, and call
    ``wait`` before they leave the process group.

    Args:
        folder: the folder of the checkpoints, which is created if it does not exist.
        keep: the number of newest checkpoints to keep.
        asynchronous: whether to write on a thread. In both cases the source is a copy in host memory, which is made
            before ``save`` returns. It is as large as this rank's parameters and optimizer state. With CUDA it is
            pinned and kept for the next save.

    Raises:
        ValueError: ``keep`` is below 1.
    """

    def __init__(self, folder: Path, *, keep: int = 2, asynchronous: bool = True) -> None:
        if keep < 1:
            raise ValueError(f"keep must be >= 1, got {keep}")
        self._folder, self._keep, self._asynchronous = Path(folder), keep, asynchronous
        self._group = dist.new_group(backend="gloo")  # a group of its own: the thread must not share the training's
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        self._pending: Future[None] | None = None
        self._on_rank_0(self._clean)

    def save(self, step: int, module: nn.Module, optimizer: Optimizer, scheduler: Any, extra: dict) -> None:
        """Save as ``step-N`` and replace an earlier one. Changes after the call are not in it.

        Args:
            scheduler: any object with ``state_dict``.
            extra: any small picklable state. That of rank 0 is kept.

        Raises:
            OSError: the previous save has failed in the meantime.
        """
        self.wait()
        state: dict[str, Any] = {"model": get_model_state_dict(module), f"rng-{dist.get_rank()}": _pack(_rng_state())}
        # If torch is asked for the state before the first step, it makes one by a step with zero gradients, which
        # counts.
        if optimizer.state:
            state["optimizer"] = get_optimizer_state_dict(module, optimizer)
        if dist.get_rank() == 0:
            state["rest"] = _pack({"scheduler": scheduler.state_dict(), "extra": extra})
        self._pending = self._thread.submit(self._write, step, _copy_to_host(state))
        if not self._asynchronous:
            self.wait()

    def wait(self) -> None:
        """Wait until the pending save, if any, is in its place, and raise its error."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def latest(self) -> int | None:
        """Return the newest step that has a checkpoint, the same on all ranks, or None."""
        return max(self._on_rank_0(self._steps), default=None)

    def load(self, step: int, module: nn.Module, optimizer: Optimizer, scheduler: Any) -> dict:
        """Load ``step-N`` into module, optimizer and scheduler, and return ``extra``.

        On a different number of ranks the full tensors are the same, but the random states are not restored.

        Raises:
            ValueError: there is no checkpoint of this step, or it is of another model or optimizer. With moments in 8
                bits also if a shard, on this number of ranks, cuts one of their blocks.
        """
        self.wait()
        steps = self._on_rank_0(self._steps)
        if step not in steps:
            raise ValueError(f"step must be one of {steps}, the checkpoints in {self._folder}, got {step}")
        reader = dcp.FileSystemReader(self._path(step))
        metadata = reader.read_metadata()
        saved, paths = metadata.state_dict_metadata, metadata.planner_data.values()
        state: dict[str, Any] = {"model": get_model_state_dict(module), "rest": _room(saved["rest"])}
        rng = f"rng-{dist.get_rank()}"
        if sum(key.startswith("rng-") for key in saved) == dist.get_world_size():
            state[rng] = _room(saved[rng])
        with_state = {path[2] for path in paths if path[:2] == ("optimizer", "state")}
        if with_state:
            state["optimizer"] = get_optimizer_state_dict(module, optimizer)
            # Parameters that never had a gradient have no state.
            wanted = state["optimizer"]["state"]
            state["optimizer"]["state"] = {name: wanted[name] for name in wanted if name in with_state}
        try:
            dcp.load(state, storage_reader=reader, process_group=self._group)
        except CheckpointException as error:
            raise ValueError(f"{self._path(step)} does not fit this run: {_first_failure(error)}") from error
        set_model_state_dict(module, state["model"])
        if with_state:
            set_optimizer_state_dict(module, optimizer, state["optimizer"], options=StateDictOptions(strict=False))
        else:
            optimizer.state.clear()
        rest = _unpack(state["rest"])
        scheduler.load_state_dict(rest["scheduler"])
        if rng in state:
            _set_rng_state(_unpack(state[rng]))
        return rest["extra"]

    def _write(self, step: int, state: dict[str, Any]) -> None:
        part = self._folder / f".step-{step}.part"
        try:
            dcp.save(state, checkpoint_id=part, process_group=self._group)  # an error of one rank is raised on all
        except CheckpointException as error:
            raise OSError(f"{self._path(step)} could not be written: {_first_failure(error)}") from error
        self._on_rank_0(lambda: self._put_in_place(part, step))

    def _clean(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        for part in self._folder.glob(".step-*.part"):
            shutil.rmtree(part)

    def _put_in_place(self, part: Path, step: int) -> None:
        gone = [self._set_aside(step)] if self._path(step).exists() else []
        part.rename(self._path(step))
        older = [other for other in self._steps() if other < step]
        gone += [self._set_aside(other) for other in older[: max(len(older) + 1 - self._keep, 0)]]
        for path in gone:
            shutil.rmtree(path)

    def _set_aside(self, step: int) -> Path:
        return self._path(step).rename(self._folder / f".step-{step}.old.part")  # half of it must not have its name

    def _path(self, step: int) -> Path:
        return self._folder / f"step-{step}"

    def _steps(self) -> list[int]:
        found = (re.fullmatch(r"step-(\d+)", path.name) for path in self._folder.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def _on_rank_0(self, function: Callable[[], Any]) -> Any:
        """Run the function on rank 0. All ranks get its result or its error."""
        outcome: list[Any] = [None, None]
        if dist.get_rank() == 0:
            try:
                outcome = [function(), None]
            except Exception as error:
                outcome = [None, error]
        dist.broadcast_object_list(outcome, src=0, group=self._group)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]


@torch.no_grad()
def _copy_to_host(state: dict[str, Any]) -> dict[str, Any]:
    """Make a deep copy. Tensors of a GPU go to pinned host memory."""
    copied = _copy(state)
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return copied


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_copy, value))
    if not isinstance(value, torch.Tensor):
        return value
    # A tensor may be a DTensor or an 8-bit moment of torchao, or both nested. torch's own stagers cannot copy that.
    if is_traceable_wrapper_subclass(value):
        names, context = value.__tensor_flatten__()
        parts = {name: _copy(getattr(value, name)) for name in names}
        return type(value).__tensor_unflatten__(parts, context, value.size(), value.stride())
    host = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
    return host.copy_(value, non_blocking=True)


def _first_failure(error: CheckpointException) -> str:
    # It is a BaseException with the error and stack of every rank: too much for a message, too general for `except`.
    rank, (cause, _) = min(error.failures.items(), key=lambda item: item[0])
    return f"rank {rank}: {cause}"


def _pack(value: Any) -> torch.Tensor:
    # This must be a tensor: of other objects torch.distributed.checkpoint keeps only those of rank 0.
    return torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)


def _unpack(packed: torch.Tensor) -> Any:
    return pickle.loads(packed.numpy().tobytes())


def _room(saved: Any) -> torch.Tensor:
    return torch.empty(saved.size, dtype=torch.uint8)


def _rng_state() -> dict[str, Any]:
    state = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_rng_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
