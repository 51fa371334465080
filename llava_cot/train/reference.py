"""Compute the reference of a run once: the values of each example by the untrained model, kept on disk."""

import hashlib
import json

import datasets
import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from llava_cot.checkpoint import checkpoint_sha256
from llava_cot.data.batches import BatchPlan
from llava_cot.data.jsonl import write_jsonl
from llava_cot.train.config import TrainConfig
from llava_cot.train.examples import Loader
from llava_cot.train.objectives.objective import Step


def reference_values(
    rows: datasets.Dataset, root: Step, plan: BatchPlan, loader: Loader, device: torch.device, config: TrainConfig
) -> np.ndarray:
    """Return the reference values of the examples of ``rows`` by ``root``: float32 [rows, examples of a row].

    Call it before ``root`` has changed. If an earlier call wrote values for the same rows to ``config.output``, they
    are read instead. All ranks must call it. Every row must have the same number of examples.
    """
    settings = [rows._fingerprint, config.model, checkpoint_sha256(config.model), config.precision.compute]
    name = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
    path = config.output / f"reference-{name}.jsonl"
    if path.is_file():
        with path.open(encoding="utf-8") as file:
            return np.array([json.loads(line)["values"] for line in file], dtype=np.float32)
    values = _compute(len(rows), root, plan, loader, device)
    if dist.get_rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(({"values": of_row} for of_row in values), path)
    return np.array(values, dtype=np.float32)


@torch.no_grad()
def _compute(num_rows: int, root: Step, plan: BatchPlan, loader: Loader, device: torch.device) -> list[list[float]]:
    """Compute the values of the examples of each row, the same on all ranks."""
    own: dict[int, list[float]] = {}
    root.eval()
    for step, batches in enumerate(loader.steps(0, plan.steps_per_epoch)):
        for micro_batch, batch in zip(plan.micro_batches(step), batches, strict=True):
            places = [index for row in micro_batch for index in row]
            found = root(batch.to(device, non_blocking=True), root.objective.reference)
            own |= zip(places, found.view(len(places) or 1, -1).tolist())
    root.train()
    for module in root.modules():  # only a backward pass would free what a forward pass gathers
        if isinstance(module, FSDPModule):
            module.reshard()
    parts: list[dict[int, list[float]]] = [{}] * dist.get_world_size()
    dist.all_gather_object(parts, own)
    values = {index: of_row for part in parts for index, of_row in part.items()}
    return [values[index] for index in range(num_rows)]
