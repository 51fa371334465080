"""Measure the speed and memory of a run: tokens a second, padding, share of the device's peak, memory."""

import resource
import time

import torch
import torch.distributed as dist

from llava_cot.data.collate import Batch
from llava_cot.families import Training
from llava_cot.train.config import TrainConfig
from llava_cot.train.flops import peak_flops


class Throughput:
    """Measures from the end of one step to the end of the next."""

    def __init__(self, config: TrainConfig, training: Training, device: torch.device) -> None:
        self._config, self._training, self._device = config, training, device
        self.skip()

    def after(self, batches: list[Batch]) -> dict[str, float]:
        """Return the values of a step over all ranks, given the micro-batches of this rank."""
        seconds = time.monotonic() - self._began
        padding = sum(batch.num_padding for batch in batches)
        places = sum(batch.targets.numel() for batch in batches)
        flops = sum(self._flops(batch) for batch in batches)
        sums = torch.tensor([places - padding, places, flops], dtype=torch.float64)
        dist.all_reduce(sums)
        tokens, places, flops = sums.tolist()
        values = {"tokens": tokens, "tokens_per_s": tokens / seconds, "padding": 1 - tokens / max(places, 1)}
        peak = peak_flops(self._device)
        if peak is not None:
            values["mfu"] = flops / seconds / peak / dist.get_world_size()
        self.skip()
        return values | {"seconds": seconds, "memory_gib": self._memory()}

    def skip(self) -> None:
        """Exclude the time since the last step."""
        self._began = time.monotonic()

    def _flops(self, batch: Batch) -> float:
        """Return the useful FLOPs: without padding, dummy images and recomputation."""
        inputs, config = batch.inputs, self._config
        return self._training.flops(
            num_tokens=batch.targets.numel() - batch.num_padding,
            **self._training.count_images(inputs),
            num_supervised=0 if config.objective == "reward" else batch.num_tokens,
            num_pairs=batch.num_pairs,
            freeze=config.freeze,
            adapters_only=config.lora is not None,
        )

    def _memory(self) -> float:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
