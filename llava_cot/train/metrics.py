"""Record a training run: one line of JSON per step, TensorBoard, and optionally Weights & Biases."""

import importlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

from llava_cot.atomic import replacing


class Metrics:
    """Writes ``folder/metrics.jsonl``, ``folder/tensorboard`` and optionally a run of wandb.

    This is a context manager. Only rank 0 writes. On other ranks every call does nothing.

    Args:
        folder: the folder of the run, which is created if it does not exist.
        rank: the rank of this process.
        resume_from: the step of the checkpoint that training resumes from. Later records are removed; 0 removes all.
        wandb: keywords for ``wandb.init``, e.g. ``{"project": "llava-cot"}``. A resumed run stays the same run there.
        config: the settings of the run, which wandb shows.

    Raises:
        ValueError: ``wandb`` is given but not installed.
    """

    def __init__(
        self,
        folder: Path,
        *,
        rank: int = 0,
        resume_from: int = 0,
        wandb: Mapping[str, Any] | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self._is_on = rank == 0
        if not self._is_on:
            return
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._wandb = None if wandb is None else _start_wandb(folder, {"config": dict(config or {}), **wandb})
        from torch.utils.tensorboard import SummaryWriter  # imported here because it takes a second

        path = folder / "metrics.jsonl"
        kept = [values for values in read_metrics(folder) if values["step"] <= resume_from]
        with replacing(path) as file:
            file.writelines(_line(values) for values in kept)
        self._file = path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_from + 1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record the values of a step. Names with a slash group charts. A value that is not finite is null in JSON."""
        if not self._is_on:
            return
        self._file.write(_line({"step": step, **values}))
        self._file.flush()  # so that a crash can damage only the last line
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(dict(values), step=step)

    def close(self) -> None:
        """Write out what TensorBoard and wandb still buffer."""
        if not self._is_on:
            return
        self._file.close()
        self._board.close()
        if self._wandb is not None:
            self._wandb.finish()

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of ``folder/metrics.jsonl`` with their ``step``. An incomplete last line is skipped."""
    path = Path(folder) / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _line(values: Mapping[str, Any]) -> str:
    plain = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()
    }
    return json.dumps(plain) + "\n"


def _start_wandb(folder: Path, settings: dict[str, Any]) -> Any:
    try:
        wandb = importlib.import_module("wandb")
    except ImportError:
        raise ValueError("wandb must be None where it is not installed (pip install wandb)") from None
    path = folder / "wandb_id"
    if not path.exists():
        with replacing(path) as file:
            file.write(uuid4().hex)
    return wandb.init(**{"dir": str(folder), "id": path.read_text(), "resume": "allow", **settings})
