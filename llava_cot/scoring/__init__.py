"""How good is a candidate: scorers, one a file, and the calibration that turns scores into thresholds."""

from llava_cot.scoring.calibration import Calibration
from llava_cot.scoring.confidence import confidence
from llava_cot.scoring.normalise import normalise
from llava_cot.scoring.scorer import Scorer, Span

SCORERS: dict[str, Scorer] = {"confidence": confidence}


def resolve_scorer(scorer: str | Scorer) -> Scorer:
    """The scorer of that name, or the callable itself."""
    if callable(scorer):
        return scorer
    if scorer not in SCORERS:
        raise ValueError(f"scorer must be one of {sorted(SCORERS)} or a callable, got {scorer!r}")
    return SCORERS[scorer]


__all__ = ["SCORERS", "Calibration", "Scorer", "Span", "confidence", "normalise", "resolve_scorer"]
