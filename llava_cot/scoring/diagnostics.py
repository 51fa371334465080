"""Can a scorer tell right from wrong, and can search help at all? Answered from any labelled candidates."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

USEFUL_AUC = 0.6  # search is worth its tokens from about 0.75, retracing near 0.9; near 0.5 it is worse than none
USEFUL_HEADROOM = 0.02  # the least difference in accuracy that counts


@dataclass(frozen=True)
class Diagnosis:
    """What ``diagnose`` found. All values but ``questions`` are shares in [0, 1]; ``realised`` can be negative.

    ``auc`` and ``realised`` are None if no question has both right and wrong candidates.
    """

    questions: int
    mean: float  # how often a random candidate is right
    selected: float  # how often the candidate with the best score is right
    oracle: float  # the share of questions with a right candidate
    auc: float | None  # how often a right candidate beats a wrong one of the same question; ties count half
    realised: float | None  # (selected - mean) / (oracle - mean)
    greedy: float | None = None  # how often greedy answers to the same questions are right

    @property
    def verdict(self) -> str:
        if self.oracle - self.mean < USEFUL_HEADROOM or self.auc is None:
            return "search cannot help here: the candidates of a question are right or wrong together"
        if self.auc < USEFUL_AUC:
            return f"search cannot help here: the scorer hardly tells right from wrong (AUC {self.auc:.2f})"
        if self.greedy is not None and self.selected - self.greedy < USEFUL_HEADROOM:
            return f"search cannot help here: the scorer's choice is no better than greedy decoding ({self.greedy:.1%})"
        return f"search can help: AUC {self.auc:.2f}, {self.realised:.0%} of the headroom is realised"


def diagnose(
    scores: Sequence[Sequence[float]], is_right: Sequence[Sequence[bool]], *, greedy: float | None = None
) -> Diagnosis:
    """Diagnose a scorer on labelled candidates.

    Args:
        scores: ``scores[q][i]`` is the score of candidate i of question q. NaN counts as -inf. Among equal best scores
            the first is selected, as in a search. Questions without candidates are left out.
        is_right: whether each candidate is right, in the same shape.
        greedy: how often greedy decoding is right on these questions, in [0, 1], for the verdict. A scorer that selects
            no better than greedy decoding is not worth a search.

    Raises:
        ValueError: ``scores`` and ``is_right`` differ in shape, or there is no candidate at all.
    """
    if [len(row) for row in scores] != [len(row) for row in is_right]:
        raise ValueError("is_right must have one value per score")
    rows = [(np.nan_to_num(s, nan=-np.inf), np.array(r, bool)) for s, r in zip(scores, is_right) if len(s)]
    if not rows:
        raise ValueError("scores must have at least one candidate, got none")
    aucs = [_auc(s, right) for s, right in rows if 0 < right.sum() < len(right)]
    mean, oracle = fmean(float(r.mean()) for _, r in rows), fmean(bool(r.any()) for _, r in rows)
    selected = fmean(bool(r[np.argmax(s)]) for s, r in rows)
    realised = (selected - mean) / (oracle - mean) if oracle > mean else None
    return Diagnosis(len(rows), mean, selected, oracle, fmean(aucs) if aucs else None, realised, greedy)


def within_question_auc(scores: Sequence[Sequence[float]], is_right: Sequence[Sequence[bool]]) -> float | None:
    """Return ``diagnose(...).auc``, the mean over questions of the AUC among the candidates of a question."""
    return diagnose(scores, is_right).auc


def _auc(scores: np.ndarray, right: np.ndarray) -> float:
    good, bad = scores[right][:, None], scores[~right][None, :]
    return float((good > bad).mean() + (good == bad).mean() / 2)
