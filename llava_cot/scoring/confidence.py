"""How sure the model was: scorers that are free, from what the sampler measured at every drawn token.

All are of the model's own distribution, before temperature and filters (with top-p, log-probs of the filtered one are
infinite), and mean over tokens, so that long candidates are not worse for being long.
"""

from collections.abc import Sequence
from statistics import fmean

from llava_cot.scoring.scorer import Span

WINDOW = 16  # tokens; DeepConf takes 2,048 of its much longer texts


def confidence(spans: Sequence[Span]) -> list[float]:
    """Mean log-prob in nats of each span's tokens."""
    return [_mean(span.logprobs) for span in spans]


def lowest_group(spans: Sequence[Span]) -> list[float]:
    """The lowest mean log-prob of any ``WINDOW`` tokens in a row: one lost place spoils a chain (arXiv 2508.15260)."""
    starts = [range(max(1, len(span.logprobs) - WINDOW + 1)) for span in spans]
    return [min(_mean(span.logprobs[s : s + WINDOW]) for s in at) for span, at in zip(spans, starts)]


def tail(spans: Sequence[Span]) -> list[float]:
    """Mean log-prob of the last ``WINDOW`` tokens, where the result stands (arXiv 2508.15260)."""
    return [_mean(span.logprobs[-WINDOW:]) for span in spans]


def negative_entropy(spans: Sequence[Span]) -> list[float]:
    """Minus the mean entropy in nats of the distributions drawn from (arXiv 2511.02309 weighs votes by its inverse)."""
    return [-_mean(span.entropies) for span in spans]


def self_certainty(spans: Sequence[Span]) -> list[float]:
    """Mean KL(uniform, p) in nats: how far from knowing nothing (arXiv 2502.18581)."""
    return [_mean(span.certainties) for span in spans]


def _mean(values: Sequence[float]) -> float:
    return fmean(values) if values else 0.0  # of no tokens at all: nothing that it could be unsure of
