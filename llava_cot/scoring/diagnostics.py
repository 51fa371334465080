"""Can a scorer tell right from wrong, and can search help at all? On any labelled set of candidates."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

USEFUL_AUC = 0.6  # search pays from about 0.75, retracing near 0.9; near 0.5 it is worse than nothing
USEFUL_HEADROOM = 0.02


@dataclass(frozen=True)
class Diagnosis:
    """Shares in [0, 1]; ``auc`` and ``realised`` are None where no question has both right and wrong candidates."""

    questions: int
    mean: float  # right, of a candidate taken at random
    selected: float  # right, of the candidate that scores best
    oracle: float  # questions with any right candidate
    auc: float | None  # how often a right candidate beats a wrong one of the same question, ties half
    realised: float | None  # (selected - mean) / (oracle - mean)
    greedy: float | None = None  # right, of greedy answers to the same questions

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
    """``scores[q][i]`` and ``is_right[q][i]`` are of candidate i of question q; questions without any are left out.

    ``greedy`` is how often greedy decoding is right on them, in [0, 1], for the verdict: a scorer that only finds what
    greedy decoding finds is worth no search. Of equal best scores the first one counts as selected, as in a search.
    NaN counts as -inf.

    Raises:
        ValueError: the two are not of one shape, or there is no candidate at all.
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
    """``diagnose(...).auc``: the mean over questions of the AUC among the candidates of one."""
    return diagnose(scores, is_right).auc


def _auc(scores: np.ndarray, right: np.ndarray) -> float:
    good, bad = scores[right][:, None], scores[~right][None, :]
    return float((good > bad).mean() + (good == bad).mean() / 2)
