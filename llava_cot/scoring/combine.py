"""Combine scorers: by stage, by rank or by weighted value. The trace shows the parts of the last two."""

from collections.abc import Mapping, Sequence
from numbers import Real

from llava_cot.core import Program, check_kind
from llava_cot.scoring.calibration import Calibration
from llava_cot.scoring.scorer import Scorer, Span, ask, check_scorer, is_groupwise, name_of, needs_of


class ByStage:
    """Scores the candidates of a stage by ``scorers[stage]``, and all others and whole answers by ``default``."""

    def __init__(self, scorers: Mapping[str, Scorer], default: Scorer, name: str = "by_stage") -> None:
        check_kind("scorers", scorers, Mapping, "a mapping from stages to scorers")
        for stage, scorer in scorers.items():
            check_scorer(f"scorers[{stage!r}]", scorer)
        check_scorer("default", default)
        self.scorers, self.default, self.__name__ = dict(scorers), default, name
        self.groupwise = any(map(is_groupwise, [*scorers.values(), default]))
        self.needs = needs_of(*scorers.values(), default)

    def __call__(self, spans: Sequence[Span]) -> Program[list[float]]:
        scores = [0.0] * len(spans)
        for stage in dict.fromkeys(span.stage for span in spans):
            places = [at for at, span in enumerate(spans) if span.stage == stage]
            scorer = self.scorers.get(stage, self.default) if stage else self.default
            found = yield from ask(scorer, [spans[at] for at in places])
            for at, score in zip(places, found):
                scores[at] = score
        return scores


class Borda:
    """Combines scorers by rank: the weighted mean of a candidate's ranks.

    A rank is the share of the other candidates that score lower; ties count half. Ranks need no common scale (arXiv
    2502.18581 votes by them). They hold within one pool, so cutoffs from a calibration mean little.

    Raises:
        ValueError: a negative weight, or no weight above 0.
    """

    groupwise = True

    def __init__(self, weights: Mapping[Scorer, float], name: str = "borda") -> None:
        self.weights, self.__name__ = _checked(weights), name
        self.needs = needs_of(*weights)

    def __call__(self, spans: Sequence[Span]) -> Program[list[float]]:
        parts = yield from _parts(self.weights, spans)
        return _mean(
            {scorer: [_rank(score, scores) for score in scores] for scorer, scores in parts.items()}, self.weights
        )


class Weighted:
    """Combines scorers by value: the weighted mean of a candidate's scores, put on one scale by calibration.

    A calibrated score counts as the share, in [0, 1], of the calibration's scores of that stage that lie below it. A
    scorer without a calibration of its name counts with its own values, which must then be on the same scale.

    Raises:
        ValueError: a negative weight, or no weight above 0.
    """

    def __init__(
        self, weights: Mapping[Scorer, float], calibrations: Sequence[Calibration] = (), name: str = "weighted"
    ) -> None:
        self.weights, self.__name__ = _checked(weights), name
        self.calibrations = {calibration.scorer: calibration for calibration in calibrations}
        self.groupwise = any(map(is_groupwise, weights))
        self.needs = needs_of(*weights)

    def __call__(self, spans: Sequence[Span]) -> Program[list[float]]:
        parts = yield from _parts(self.weights, spans)
        for scorer, scores in parts.items():
            calibration = self.calibrations.get(name_of(scorer))
            if calibration is not None:
                stages = [span.stage or span.grammar.conclusion for span in spans]
                parts[scorer] = [calibration.quantile(stage, score) for stage, score in zip(stages, scores)]
        return _mean(parts, self.weights)


def _checked(weights: Mapping[Scorer, float]) -> dict[Scorer, float]:
    check_kind("weights", weights, Mapping, "a mapping from scorers to their weights")
    for scorer, weight in weights.items():
        check_scorer("a key of weights", scorer)
        check_kind(f"weights[{name_of(scorer)}]", weight, Real, "a number")
    if not weights or any(not weight >= 0 for weight in weights.values()) or not sum(weights.values()):
        raise ValueError(f"weights must be >= 0 and not all 0, got {[*weights.values()]}")
    return dict(weights)


def _parts(weights: Mapping[Scorer, float], spans: Sequence[Span]) -> Program[dict[Scorer, list[float]]]:
    parts = {}
    for scorer in weights:
        parts[scorer] = [*(yield from ask(scorer, spans))]
        for span, score in zip(spans, parts[scorer]):
            span.notes[name_of(scorer)] = float(score)
    return parts


def _rank(score: float, scores: Sequence[float]) -> float:
    below = sum(other < score for other in scores)
    ties = sum(other == score for other in scores) - 1
    return (below + ties / 2) / (len(scores) - 1) if len(scores) > 1 else 1.0


def _mean(parts: Mapping[Scorer, Sequence[float]], weights: Mapping[Scorer, float]) -> list[float]:
    columns = [[weights[scorer] * score for score in scores] for scorer, scores in parts.items()]
    return [sum(row) / sum(weights.values()) for row in zip(*columns)]
