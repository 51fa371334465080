"""The record of a training run: one line of JSON a step, TensorBoard, and Weights & Biases if asked for."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava_cot.atomic import replacing


class Metrics:
    """Writes ``folder/metrics.jsonl``, ``folder/tensorboard`` and, by option, a run of wandb.

    Only rank 0 writes; on the others every call does nothing.

    Args:
        folder: of the run; made if it is not there.
        rank: of this process.
        resume_from: the step of the checkpoint that training goes on from: what was logged after it is cut, 0 for all.
        wandb: keywords for ``wandb.init``, e.g. ``{"project": "llava-cot"}``.
        config: what the run was asked for, shown by wandb.

    Raises:
        ImportError: ``wandb`` is given and not installed.
    """

    def __init__(
        self,
        folder: Path,
        *,
        rank: int = 0,
        resume_from: int = 0,
        wandb: Mapping[str, Any] | None = None,
        config: Mapping[str, Any] | None = None,
    ):
        self._on = rank == 0
        if not self._on:
            return
        self._wandb = None
        if wandb is not None:
            self._wandb = _wandb().init(
                **{"dir": str(folder), "config": dict(config or {}), "resume": "allow", **wandb}
            )
        from torch.utils.tensorboard import SummaryWriter  # here, as it takes a second to import

        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "metrics.jsonl"
        _cut(self._path, resume_from)
        self._file = self._path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_from + 1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record the values of a step; a name such as "loss/caption" is a chart in the group "loss"."""
        if not self._on:
            return
        # Flushed line by line: what a kill leaves is whole lines, but for the last.
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(dict(values), step=step)

    def close(self) -> None:
        """Write out what TensorBoard and wandb still hold."""
        if not self._on:
            return
        self._file.close()
        self._board.close()
        if self._wandb is not None:
            self._wandb.finish()

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *error) -> None:
        self.close()


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The lines of ``folder/metrics.jsonl``, a torn last one left out."""
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in _whole_lines(path)]


def _whole_lines(path: Path) -> list[str]:
    if not path.exists():
        return []
    return [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]


def _cut(path: Path, step: int) -> None:
    if not path.exists():
        return
    with replacing(path) as file:
        file.writelines(line for line in _whole_lines(path) if json.loads(line)["step"] <= step)
        file.flush()
        os.fsync(file.fileno())


def _wandb() -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ImportError("wandb is asked for but not installed: pip install wandb") from error
    return wandb
