"""How sure the model was. These scorers are free, because the sampler measures what they need at every drawn token.

All use the model's own distribution, before temperature and filters: under a filter such as top-p, log-probs can be
infinite. All take means over tokens, so a long candidate does not rank lower for being long.
"""

from collections.abc import Sequence
from statistics import fmean

from llava_cot.core import Feature
from llava_cot.scoring.scorer import Span, needing

WINDOW = 16  # tokens; DeepConf uses 2,048 on much longer texts


@needing(Feature.LOGPROBS)
def confidence(spans: Sequence[Span]) -> list[float]:
    """Return the mean log-prob, in nats, of each span's tokens."""
    return [_mean(span.logprobs) for span in spans]


@needing(Feature.LOGPROBS)
def lowest_group(spans: Sequence[Span]) -> list[float]:
    """Return the lowest mean log-prob, in nats, of any ``WINDOW`` tokens in a row (DeepConf, arXiv 2508.15260).

    A single uncertain passage can spoil a chain of reasoning.
    """
    starts = [range(max(1, len(span.logprobs) - WINDOW + 1)) for span in spans]
    return [min(_mean(span.logprobs[s : s + WINDOW]) for s in at) for span, at in zip(spans, starts)]


@needing(Feature.LOGPROBS)
def tail(spans: Sequence[Span]) -> list[float]:
    """Return the mean log-prob, in nats, of the last ``WINDOW`` tokens, which hold the result (arXiv 2508.15260)."""
    return [_mean(span.logprobs[-WINDOW:]) for span in spans]


@needing(Feature.ENTROPIES)
def negative_entropy(spans: Sequence[Span]) -> list[float]:
    """Return minus the mean entropy, in nats, at each span's tokens (arXiv 2511.02309 weighs votes by its inverse)."""
    return [-_mean(span.entropies) for span in spans]


@needing(Feature.ENTROPIES)
def self_certainty(spans: Sequence[Span]) -> list[float]:
    """Return the mean KL(uniform, p), in nats: how far p is from knowing nothing (arXiv 2502.18581)."""
    return [_mean(span.certainties) for span in spans]


def _mean(values: Sequence[float]) -> float:
    return fmean(values) if values else 0.0  # without tokens there is nothing to be unsure of
