"""The learning rate over the steps of a run."""

import math
from collections.abc import Callable

from llava_cot.train.config import Schedule


def learning_rate(schedule: Schedule, total_steps: int, steps_per_epoch: int) -> Callable[[int], float]:
    """Return the share of the peak as a function of the step. A warm-up of n steps begins with 1/n, 2/n, ..."""
    total = schedule.total_steps or total_steps

    def share(step: int) -> float:
        if step < schedule.warmup_steps:
            return (step + 1) / schedule.warmup_steps
        if schedule.name == "constant":
            return 1.0
        if schedule.name == "step":
            return schedule.gamma ** (step // steps_per_epoch)
        progress = (step - schedule.warmup_steps) / max(1, total - schedule.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        return schedule.min_ratio + (1 - schedule.min_ratio) * cosine

    return share
