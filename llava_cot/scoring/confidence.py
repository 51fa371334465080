"""Confidence: the mean log-prob of a candidate's tokens, free from the sampler."""

from collections.abc import Sequence

from llava_cot.scoring.scorer import Span


def confidence(spans: Sequence[Span]) -> list[float]:
    """Mean log-prob in nats of each span's tokens under the model (before temperature and filters)."""
    return [sum(span.logprobs) / len(span.logprobs) for span in spans]
