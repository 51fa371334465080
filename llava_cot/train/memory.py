"""Predict what a training step holds on one GPU, by running the step on tensors that have shapes but no data.

The run's own modules (checkpoints, FSDP2 units, loss head) work on fake tensors, under a process group whose ranks do
not exist. torch's FSDP memory tracker adds up what is alive. So nothing here depends on how a layer computes, and
nothing is allocated. Only the optimizer is counted by hand.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedConfig, PreTrainedModel

from llava_cot.families import training_of
from llava_cot.train.config import Optimizer, TrainConfig
from llava_cot.train.model import build_model
from llava_cot.train.sharding import build_mesh, checkpoint_activations, shard
from llava_cot.train.stochastic_adamw import CHUNK

CATEGORIES = {  # our categories, and those of the tracker in each
    "parameters": ("Sharded Param", "Buffer"),
    "gradients": ("Sharded Grad",),
    "optimizer": ("OptState",),
    "gathered weights": ("Unsharded Param", "All Gather"),
    "activations": ("Activation", "Inputs"),
    "backward": ("Temp", "Unsharded Grad", "Reduce Scatter"),
}
BLOCK = 256  # elements of torchao's 8-bit states that share a float32 scale


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU at three moments of a step, by category. Each moment has all of ``CATEGORIES``."""

    forward: dict[str, int]  # at the end of the forward pass
    peak: dict[str, int]  # at the peak of forward and backward
    update: dict[str, int]  # while the optimizer steps

    @property
    def highest(self) -> dict[str, int]:
        return max((self.forward, self.peak, self.update), key=lambda moment: sum(moment.values()))

    @property
    def total(self) -> int:
        """The bytes at the highest of the three moments."""
        return sum(self.highest.values())


def simulate_step(
    config: TrainConfig, *, ranks: int, rows: int, row_tokens: int, images_per_row: int, accumulates: bool
) -> Memory:
    """Return the memory of a step with ``rows`` rows on each of ``ranks`` ranks. Every token is supervised.

    ``accumulates`` says whether gradients of an earlier micro-batch already exist.

    Raises:
        ValueError: ``sharding.replicas`` does not divide ``ranks``.
        RuntimeError: a process group already exists.
    """
    with fake_ranks(ranks):
        root = _LossOf(build_model(config, empty=True))
        if config.activation_checkpointing:
            checkpoint_activations(root)
        shard(root, build_mesh(torch.device("cpu"), config.sharding.replicas), config.precision, config.sharding)
        return _run(root, config, rows, row_tokens, images_per_row, accumulates)


def _run(root: "_LossOf", config: TrainConfig, rows: int, row_tokens: int, images: int, accumulates: bool) -> Memory:
    with FakeTensorMode(allow_non_fake_inputs=True), _ZeroValues():
        root.to_empty(device="cpu")
        trained = [parameter for parameter in root.parameters() if parameter.requires_grad]
        if accumulates:
            for parameter in trained:
                parameter.grad = torch.zeros_like(parameter)
        inputs = step_inputs(root.model.config, rows=rows, row_tokens=row_tokens, images_per_row=images)
        tracker = FSDPMemTracker(root)
        tracker.track_inputs((inputs,))
        with tracker:
            loss = root(inputs)
            forward = by_category(tracker, "current")
            loss.backward()
        peak, after = by_category(tracker, "peak"), by_category(tracker, "current")
        state = optimizer_bytes(trained, config.optimizer)
        after["backward"] += update_bytes(trained, config.optimizer)
    return Memory(*({**moment, "optimizer": state} for moment in (forward, peak, after)))


def step_inputs(settings: PreTrainedConfig, *, rows: int, row_tokens: int, images_per_row: int) -> dict[str, Tensor]:
    """Return inputs of the model as the ``Collator`` makes them, with two sequences per row and the largest images."""
    positions = torch.arange(row_tokens).remainder(max(1, row_tokens // 2)).repeat(rows, 1)
    text = {"input_ids": torch.zeros(rows, row_tokens, dtype=torch.int64), "position_ids": positions}
    return training_of(settings).full_images(text, images_per_row=images_per_row)


def optimizer_bytes(parameters: list[nn.Parameter], settings: Optimizer) -> int:
    """Return the bytes of the two moments of each trained parameter's shard, with scales and step counters."""
    total = 0
    for local in map(_local, parameters):
        in_8_bits = settings.name == "adamw8bit" and local.numel() >= 4096 and local.numel() % BLOCK == 0
        moment = local.numel() + 4 * local.numel() // BLOCK + 4 * 256 if in_8_bits else local.nbytes
        total += 2 * moment + 4  # the step
    return total


def update_bytes(parameters: list[nn.Parameter], settings: Optimizer) -> int:
    """Return the temporary bytes of an update: float32 copies of one parameter. torch's fused AdamW makes none."""
    if settings.name == "adamw":
        return 0
    largest = max(_local(parameter).numel() for parameter in parameters)
    if settings.name == "adamw_stochastic":
        largest = min(largest, CHUNK)
    # Gradient, two moments, denominator, weight, and random bits or their result.
    return 6 * 4 * largest


def _local(parameter: nn.Parameter) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def by_category(tracker: FSDPMemTracker, moment: str) -> dict[str, int]:
    """Return what a tracker counted on all devices, at the ``peak`` or ``current`` moment."""
    found: dict[str, int] = {}
    for snapshot in tracker.get_tracker_snapshot(moment).values():
        for kind, count in snapshot.items():
            name = str(getattr(kind, "value", kind))
            found[name] = found.get(name, 0) + count
    return {name: sum(found.get(kind, 0) for kind in kinds) for name, kinds in CATEGORIES.items()}


class _LossOf(nn.Module):
    """A model with its loss head. A call returns a scalar, as ``Step`` does, and all tokens are supervised."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        hidden = self.model.model(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)
        if hasattr(self.model, "lm_head"):
            return self.model.lm_head(hidden, inputs["input_ids"].flatten()).sum()
        return self.model.head(hidden[-1:]).float().sum()  # a reward model is read at the end of an example


class _ZeroValues(TorchDispatchMode):
    """Makes every value that code reads 0, since fake tensors have no values. So checks of targets pass."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 0
        return func(*args, **(kwargs or {}))


@contextmanager
def fake_ranks(count: int) -> Iterator[None]:
    """Make a process group of ``count`` ranks in this process. Its collectives do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise RuntimeError("a plan must be made by a process without a process group: call it without torchrun")
    dist.init_process_group("fake", rank=0, world_size=count, store=cast(dist.Store, FakeStore()))
    try:
        yield
    finally:
        dist.destroy_process_group()
