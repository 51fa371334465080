"""How good is a candidate? Scorers, one idea per file, and the calibration that turns scores into thresholds."""

from llava_cot.scoring.agreement import look_ahead, self_consistency, vote
from llava_cot.scoring.calibration import Calibration
from llava_cot.scoring.combine import Borda, ByStage, Weighted
from llava_cot.scoring.confidence import confidence, lowest_group, negative_entropy, self_certainty, tail
from llava_cot.scoring.diagnostics import Diagnosis, diagnose, within_question_auc
from llava_cot.scoring.judge import JudgeScorer
from llava_cot.scoring.scorer import Scorer, Span, check_scorer, groupwise
from llava_cot.scoring.step_format import QWEN_VL_PRM, VISUAL_PRM, StepFormat, paragraphs
from llava_cot.text import normalise

# For use without a second model: captions by shared facts, reasonings by where they lead, the rest by votes
by_stage = ByStage({"CAPTION": self_consistency, "REASONING": look_ahead, "CONCLUSION": vote}, default=vote)

SCORERS: dict[str, Scorer] = {
    "confidence": confidence,
    "lowest_group": lowest_group,
    "tail": tail,
    "negative_entropy": negative_entropy,
    "self_certainty": self_certainty,
    "self_consistency": self_consistency,
    "vote": vote,
    "look_ahead": look_ahead,
    "by_stage": by_stage,
}


def resolve_scorer(scorer: str | Scorer) -> Scorer:
    """Return the scorer of that name, or the callable itself.

    Raises:
        ValueError: there is no scorer of that name.
        TypeError: it is neither a name nor a callable.
    """
    if not isinstance(scorer, str):
        check_scorer("scorer", scorer)
        return scorer
    if scorer not in SCORERS:
        raise ValueError(f"scorer must be one of {sorted(SCORERS)} or a callable, got {scorer!r}")
    return SCORERS[scorer]


__all__ = [
    "QWEN_VL_PRM",
    "SCORERS",
    "VISUAL_PRM",
    "Borda",
    "ByStage",
    "Calibration",
    "Diagnosis",
    "JudgeScorer",
    "Scorer",
    "Span",
    "StepFormat",
    "Weighted",
    "by_stage",
    "confidence",
    "diagnose",
    "groupwise",
    "look_ahead",
    "lowest_group",
    "negative_entropy",
    "normalise",
    "paragraphs",
    "resolve_scorer",
    "self_certainty",
    "self_consistency",
    "tail",
    "vote",
    "within_question_auc",
]
