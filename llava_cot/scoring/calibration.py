"""Thresholds as quantiles of the scores that a scorer gave to a stage's candidates on named data."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Calibration:
    """``quantiles[stage]`` holds the scores at 0, 1, ..., 100 %. ``data`` names what they were measured on."""

    scorer: str
    data: str
    quantiles: dict[str, list[float]]

    @classmethod
    def fit(cls, scorer: str, data: str, scores: dict[str, list[float]]) -> "Calibration":
        """From the scores of each stage's candidates; -inf and NaN are left out."""
        percent = np.arange(101)
        finite = {stage: [s for s in values if np.isfinite(s)] for stage, values in scores.items()}
        return cls(scorer, data, {s: np.percentile(v, percent).round(6).tolist() for s, v in finite.items() if v})

    def cutoff(self, stage: str, quantile: float) -> float:
        """The score below which ``quantile`` (in [0, 1]) of this stage's candidates lie."""
        if stage not in self.quantiles:
            raise ValueError(f"calibration on {self.data!r} must have scores of stage {stage!s}, got none")
        return float(np.interp(100 * quantile, np.arange(101), self.quantiles[stage]))

    def z_cutoff(self, stage: str, z: float) -> float:
        """Mean + ``z`` standard deviations of this stage's scores, both taken from its 101 quantiles."""
        self.cutoff(stage, 0.5)  # raises where there are none
        return float(np.mean(self.quantiles[stage]) + z * np.std(self.quantiles[stage]))

    def save(self, path: Path | str) -> None:
        Path(path).write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path | str) -> "Calibration":
        return cls(**json.loads(Path(path).read_text()))
