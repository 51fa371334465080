"""Thresholds as quantiles of the scores that a scorer gave to a stage's candidates on named data."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from llava_cot.atomic import replacing


@dataclass(frozen=True)
class Calibration:
    """``quantiles[stage]`` holds the scores at 0, 1, ..., 100 %. ``data`` names what they were measured on.

    ``model`` is the SHA-256 of the weights that drew the candidates (``checkpoint_sha256``), where they are in a file.
    """

    scorer: str
    data: str
    quantiles: dict[str, list[float]]
    model: str | None = None

    @classmethod
    def fit(cls, scorer: str, data: str, scores: dict[str, list[float]], model: str | None = None) -> "Calibration":
        """From the scores of each stage's candidates; -inf and NaN are left out."""
        percent = np.arange(101)
        finite = {stage: [s for s in values if np.isfinite(s)] for stage, values in scores.items()}
        quantiles = {s: np.percentile(v, percent).round(6).tolist() for s, v in finite.items() if v}
        return cls(scorer, data, quantiles, model)

    def cutoff(self, stage: str, quantile: float) -> float:
        """The score below which ``quantile`` (in [0, 1]) of this stage's candidates lie."""
        if stage not in self.quantiles:
            raise ValueError(f"calibration on {self.data!r} must have scores of stage {stage!s}, got none")
        return float(np.interp(100 * quantile, np.arange(101), self.quantiles[stage]))

    def quantile(self, stage: str, score: float) -> float:
        """The share of this stage's scores below ``score``, in [0, 1]: a scale that all scorers share."""
        self.cutoff(stage, 0.5)  # raises where there are none
        known = self.quantiles[stage]
        middle = (np.searchsorted(known, score, "left") + np.searchsorted(known, score, "right") - 1) / 2
        return float(np.clip(middle / 100, 0, 1))

    def z_cutoff(self, stage: str, z: float) -> float:
        """Mean + ``z`` standard deviations of this stage's scores, both taken from its 101 quantiles."""
        self.cutoff(stage, 0.5)  # raises where there are none
        return float(np.mean(self.quantiles[stage]) + z * np.std(self.quantiles[stage]))

    def save(self, path: Path | str) -> None:
        """Write it into a file of several, in the place of that of the same scorer."""
        path = Path(path)
        others = [other for other in Calibration.load_all(path) if other.scorer != self.scorer] if path.exists() else []
        with replacing(path) as file:
            file.write(json.dumps([asdict(one) for one in (*others, self)], indent=1) + "\n")

    @classmethod
    def load_all(cls, path: Path | str) -> list["Calibration"]:
        """Every calibration of a file. Raises ``ValueError`` if it is not one of them."""
        try:
            return [cls(**one) for one in json.loads(Path(path).read_text())]
        except (TypeError, ValueError) as error:
            raise ValueError(f"path must be a file of calibrations, got {str(path)!r}: {error}") from None
