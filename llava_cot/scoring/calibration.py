"""Thresholds as quantiles of the scores that a scorer gave to the candidates of a stage on named data."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from llava_cot.atomic import replacing


@dataclass(frozen=True)
class Calibration:
    """The quantiles of a scorer's scores: ``quantiles[stage]`` holds 101 scores, at 0, 1, ..., 100 %.

    ``data`` names the data that they were measured on. ``model`` is the SHA-256 of the weights that drew the candidates
    (``checkpoint_sha256``), or None if the weights are in no local file.
    """

    scorer: str
    data: str
    quantiles: dict[str, list[float]]
    model: str | None = None

    @classmethod
    def fit(cls, scorer: str, data: str, scores: dict[str, list[float]], model: str | None = None) -> "Calibration":
        """Calibrate from the scores of each stage's candidates, without those that are infinite or NaN."""
        percent = np.arange(101)
        finite = {stage: [s for s in values if np.isfinite(s)] for stage, values in scores.items()}
        quantiles = {s: np.percentile(v, percent).round(6).tolist() for s, v in finite.items() if v}
        return cls(scorer, data, quantiles, model)

    def cutoff(self, stage: str, quantile: float) -> float:
        """Return the score below which the share ``quantile``, in [0, 1], of this stage's candidates lies.

        Raises:
            ValueError: the calibration has no scores of this stage.
        """
        if stage not in self.quantiles:
            raise ValueError(f"calibration on {self.data!r} must have scores of stage {stage!s}, got none")
        return float(np.interp(100 * quantile, np.arange(101), self.quantiles[stage]))

    def quantile(self, stage: str, score: float) -> float:
        """Return the share, in [0, 1], of this stage's scores below ``score``. All scorers share this scale."""
        self.cutoff(stage, 0.5)  # raises if there are none
        known = self.quantiles[stage]
        middle = (np.searchsorted(known, score, "left") + np.searchsorted(known, score, "right") - 1) / 2
        return float(np.clip(middle / 100, 0, 1))

    def z_cutoff(self, stage: str, z: float) -> float:
        """Return the mean plus ``z`` standard deviations of this stage's scores, both from its 101 quantiles."""
        self.cutoff(stage, 0.5)  # raises if there are none
        return float(np.mean(self.quantiles[stage]) + z * np.std(self.quantiles[stage]))

    def save(self, path: Path | str) -> None:
        """Write this calibration to a file of several, in place of an earlier one of the same scorer."""
        path = Path(path)
        others = [other for other in Calibration.load_all(path) if other.scorer != self.scorer] if path.exists() else []
        with replacing(path) as file:
            file.write(json.dumps([asdict(one) for one in (*others, self)], indent=1) + "\n")

    @classmethod
    def load_all(cls, path: Path | str) -> list["Calibration"]:
        """Return every calibration in a file. Raises ``ValueError`` if it does not hold calibrations."""
        try:
            return [cls(**one) for one in json.loads(Path(path).read_text())]
        except (TypeError, ValueError) as error:
            raise ValueError(f"path must be a file of calibrations, got {str(path)!r}: {error}") from None
