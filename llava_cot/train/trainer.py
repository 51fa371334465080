"""The training loop: steps, evaluation, checkpoints, and an export for transformers at the end."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import datasets
import torch
import torch.distributed as dist
import yaml
from transformers import AutoProcessor

from llava_cot.atomic import replacing
from llava_cot.data.batches import BatchPlan
from llava_cot.data.collate import Batch, Collator
from llava_cot.families import training_of
from llava_cot.train.checkpoints import Checkpoints
from llava_cot.train.config import TrainConfig
from llava_cot.train.distributed import process_group
from llava_cot.train.examples import Loader, load_examples, split
from llava_cot.train.export import export
from llava_cot.train.metrics import Metrics
from llava_cot.train.model import build_model
from llava_cot.train.objectives import objective_of
from llava_cot.train.objectives.objective import Step
from llava_cot.train.optimizer import build_optimizer
from llava_cot.train.progress import Progress
from llava_cot.train.reference import reference_values
from llava_cot.train.schedule import learning_rate
from llava_cot.train.sharding import build_mesh, checkpoint_activations, fill, shard
from llava_cot.train.throughput import Throughput

STOPPED = 128 + signal.SIGTERM  # the exit status of a run that was asked to stop


def train(config: TrainConfig) -> None:
    """Train as ``config`` says, from the newest checkpoint in ``config.output`` if there is one.

    One process runs it, or each process of torchrun. The trained model is in ``config.output / "model"``.

    Raises:
        ValueError: a setting does not fit the model, the data or the checkpoint.
        FloatingPointError: a gradient is not finite. The newest checkpoint is from before that step.
        SystemExit: SIGTERM ended the run after a checkpoint. Run the same command to resume.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    with process_group(config.device) as device:
        Trainer(config, device).run()


class Trainer:
    """One run, with its parts and its loop."""

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self.processor = AutoProcessor.from_pretrained(config.model)
        self.objective = objective_of(config)
        rows, held_out = split(load_examples(config, self.objective, self.processor), config.eval_fraction)
        if config.eval_data is not None:
            held_out = load_examples(config, self.objective, self.processor, evaluation=True)
        same = {"batch_size", "max_row_tokens", "seed", "freeze", "lora", "objective"}
        self.identity = {"data": rows._fingerprint, **config.model_dump(mode="json", include=same)}
        self.root = self._build_root()
        self.plan, self.loader = self._open(rows)
        self.held_out = self._open(held_out) if len(held_out) else None
        self.last_step = self.plan.steps_per_epoch * config.epochs
        torch.manual_seed(config.seed + dist.get_rank())
        self.optimizer = build_optimizer(self.root.parameters(), config.optimizer)
        share = learning_rate(config.schedule, self.last_step, self.plan.steps_per_epoch)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, share)
        self.last_step = min(self.last_step, config.max_steps or self.last_step)
        keep, asynchronous = config.keep_checkpoints, config.asynchronous_checkpoints
        self.checkpoints = Checkpoints(config.output / "checkpoints", keep=keep, asynchronous=asynchronous)

    def _open(self, rows: datasets.Dataset) -> tuple[BatchPlan, Loader]:
        config = self.config
        plan = BatchPlan(
            rows["length"],
            batch_size=config.batch_size,
            rows_per_batch=config.rows_per_batch,
            max_row_tokens=config.max_row_tokens,
            seed=config.seed,
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
        )
        collator, pin_memory = Collator(self.processor, self.root.model.config), self.device.type == "cuda"
        loader = Loader(rows, plan, collator, workers=config.workers, pin_memory=pin_memory)
        if self.objective.reference is not None:
            values = reference_values(rows, self.root, plan, loader, self.device, config)
            loader = Loader(rows, plan, collator, workers=config.workers, pin_memory=pin_memory, values=values)
        return plan, loader

    def _build_root(self) -> Any:  # a Step that is an FSDPModule
        root = Step(build_model(self.config, empty=True), self.objective)
        whole = Step(build_model(self.config, empty=False), self.objective) if dist.get_rank() == 0 else None
        if self.config.activation_checkpointing:
            checkpoint_activations(root)
        mesh = build_mesh(self.device, self.config.sharding.replicas)
        shard(root, mesh, self.config.precision, self.config.sharding)
        fill(root, self.device, whole)
        return root

    def run(self) -> None:
        """Run all steps from the newest checkpoint on, and then export the model."""
        start = self.checkpoints.latest() or 0
        extra = self.checkpoints.load(start, self.root, self.optimizer, self.scheduler) if start else self.identity
        if differs := [name for name, value in self.identity.items() if extra[name] != value]:
            raise ValueError(f"output must be new or go on with the same {differs[0]}, got {str(self.config.output)!r}")
        if dist.get_rank() == 0:
            self.config.output.mkdir(parents=True, exist_ok=True)
            with replacing(self.config.output / "config.yaml") as file:
                yaml.safe_dump(self.config.model_dump(mode="json"), file, sort_keys=False)
        try:
            self._loop(start)
        finally:
            self.checkpoints.wait()  # without a wait, a pending save is lost with the process group
        export(self.root, self.config, self.processor, self.config.output / "model")

    def _loop(self, start: int) -> None:
        config = self.config
        metrics, progress = self._records(start)
        with metrics, progress, stop_requested() as stop:
            throughput = Throughput(config, training_of(self.root.model.config), self.device)
            for step, batches in enumerate(self.loader.steps(start, self.last_step), start + 1):
                values, stopping = self._step(batches, stop.is_set())
                values |= throughput.after(batches)
                is_last = stopping or step == self.last_step
                if self.held_out is not None and (is_due(step, config.eval_every) or step == self.last_step):
                    values |= self.evaluate()
                    throughput.skip()
                progress.update(step, values)
                if is_due(step, config.log_every) or is_last:
                    metrics.log(step, values)
                if stopping or is_due(step, config.save_every) or (is_last and config.save_every is not None):
                    self.checkpoints.save(step, self.root, self.optimizer, self.scheduler, self.identity)
                if stopping and step < self.last_step:
                    print(f"stopped at step {step}", file=sys.stderr)
                    raise SystemExit(STOPPED)

    def _step(self, batches: list[Batch], stop: bool) -> tuple[dict[str, float], bool]:
        """Run one optimizer step on the micro-batches of all ranks.

        Returns the values of the step, and whether any rank was asked to stop.
        """
        weight = sum(self.objective.weight(batch) for batch in batches)
        # float64 on the host makes the sum exact, so it is the same for any number of ranks.
        shared = torch.tensor([weight, float(stop)], dtype=torch.float64)
        dist.all_reduce(shared)
        weight, stops = shared.tolist()
        scale = dist.get_world_size() / (weight or 1.0)  # FSDP2 averages over ranks, but this is a sum
        sums = torch.zeros(len(self.objective.names) + 1, 2, dtype=torch.float64)
        for index, batch in enumerate(batches):
            self.root.set_requires_all_reduce(index == len(batches) - 1)  # HSDP reduces once a step
            total, parts = self.root(batch.to(self.device, non_blocking=True))
            (total * scale).backward()
            sums += self._add(total, parts)
        norm = torch.nn.utils.clip_grad_norm_(
            self.root.parameters(), self.config.optimizer.clip_norm or float("inf"), error_if_nonfinite=False
        )
        norm = norm.full_tensor() if isinstance(norm, torch.distributed.tensor.DTensor) else norm
        if not torch.isfinite(norm):
            raise FloatingPointError(f"the gradient's norm must be finite, got {norm.item()}")
        lr = self.scheduler.get_last_lr()[0]
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        return self._values(sums, weight) | {"lr": float(lr), "grad_norm": norm.item()}, bool(stops)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Return the losses on held-out data, with names eval/..."""
        assert self.held_out is not None
        plan, loader = self.held_out
        self.root.eval()
        sums, weight = torch.zeros(len(self.objective.names) + 1, 2, dtype=torch.float64), torch.zeros(1).double()
        for batches in loader.steps(0, plan.steps_per_epoch):
            for batch in batches:
                weight += self.objective.weight(batch)
                sums += self._add(*self.root(batch.to(self.device, non_blocking=True)))
        dist.all_reduce(weight)
        self.root.train()
        return {f"eval/{name}": value for name, value in self._values(sums, weight.item()).items()}

    @staticmethod
    def _add(total: torch.Tensor, parts: torch.Tensor) -> torch.Tensor:
        """Stack the sums as [1 + names, 2] on the host: the loss and a zero, then each part and its count."""
        whole = torch.stack([total.detach().float(), torch.zeros_like(total).float()])
        return torch.cat([whole[None], parts.float()]).double().cpu()

    def _values(self, sums: torch.Tensor, weight: float) -> dict[str, float]:
        dist.all_reduce(sums)
        (total, _), *parts = sums.tolist()
        found = {name: part / count for name, (part, count) in zip(self.objective.names, parts) if count}
        return {"loss": total / (weight or 1.0)} | found

    def _records(self, start: int) -> tuple[Metrics, Progress]:
        rank, config = dist.get_rank(), self.config
        wandb = {"project": config.wandb} if config.wandb else None
        shown = config.model_dump(mode="json")
        metrics = Metrics(config.output, rank=rank, resume_from=start, wandb=wandb, config=shown)
        return metrics, Progress(self.last_step, rank=rank, start=start, every=config.log_every)


def is_due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


@contextmanager
def stop_requested() -> Iterator[threading.Event]:
    """Yield an event that SIGTERM sets during the block."""
    event = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGTERM, before)
