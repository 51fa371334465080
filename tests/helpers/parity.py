"""Comparing with transformers, token for token and logit for logit."""

from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch.nn.functional import pad
from transformers import RepetitionPenaltyLogitsProcessor

NEAR_TIE = 1e-4


def greedy_differences(model, inputs, got, expected, near_tie=NEAR_TIE) -> int:
    """0 if the sequences are equal, or first differ at a near tie of transformers' own top two (which is printed)."""
    if torch.equal(got, expected):
        return 0
    width = min(got.shape[1], expected.shape[1])
    differs = (got[0, :width] != expected[0, :width]).nonzero()
    at = int(differs[0]) if len(differs) else width
    ids = expected[:, :at]
    mask = inputs["cross_attention_mask"]
    mask = torch.cat([mask, mask[:, -1:].expand(-1, at - mask.shape[1], -1, -1)], dim=1)
    again = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids), "cross_attention_mask": mask}
    with torch.inference_mode():
        best = model(**again).logits[0, -1].topk(2).values
    gap = float(best[0] - best[1])
    print(
        f"excused: first difference at token {at}, top-2 gap {gap:.1e}" if gap < near_tie else f"gap {gap:.1e} at {at}"
    )
    return int(gap >= near_tie)


@contextmanager
def record_logits(engine):
    """Collects the logits [V] of every step of a search that grows a single branch."""
    view, logits = engine.view, []
    prefill, decode = view.prefill, view.decode

    def recording_prefill(*args):
        (prefilled,) = prefill(*args)
        logits.append(prefilled.logits)
        return [prefilled]

    def recording_decode(*args, **kwargs):
        rows = decode(*args, **kwargs)
        logits.append(rows[0])
        return rows

    view.prefill, view.decode = recording_prefill, recording_decode
    try:
        yield logits
    finally:
        del view.prefill, view.decode


@contextmanager
def image_tokens_without_a_logit():
    """Let transformers penalise repetition where a prompt has an image token that is beyond the logits, as Mllama's is.

    Older releases, such as 5.17, fail there. Newer ones leave such a token out, as this does.
    """
    call = RepetitionPenaltyLogitsProcessor.__call__

    def padded(self, input_ids, scores):
        beyond = max(0, int(input_ids.max()) + 1 - scores.shape[-1])
        return call(self, input_ids, pad(scores, (0, beyond), value=-torch.inf))[..., : scores.shape[-1]]

    with patch.object(RepetitionPenaltyLogitsProcessor, "__call__", padded):
        yield
