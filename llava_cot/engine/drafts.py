"""Which tokens are drafted in a step, and how far drafts may take a candidate ahead of its siblings.

A draft is read in the pass that computes the last token of its candidate. The sampler draws after each of its tokens,
with the seed and the position that the token would have without drafts, and what was drawn counts as long as it equals
the draft. So drafts change no token, but for the rounding of a wider pass.
"""

import math
from collections.abc import Sequence

from llava_cot.engine.branch import Branch
from llava_cot.engine.history import History, last_tokens
from llava_cot.engine.session import Job, Slot

DRAFT_TOKENS = 8
MOST_ROWS = 64  # of a pass with drafts: where others fill it, rows cost time


class SpoiltDraft(Exception):
    """A pass with drafts has made NaN, perhaps from a token that no candidate draws.

    Such a token spoils the rows before it too: attention multiplies the values that a row must not see by 0. So the
    pass is done again without drafts.
    """


class Drafts:
    """Drafts up to ``most_tokens`` for each candidate, as long as a pass has no more than ``most_rows`` rows."""

    def __init__(self, most_tokens: int) -> None:
        self.most_tokens, self.most_rows = most_tokens, MOST_ROWS

    def propose(self, jobs: Sequence[Job]) -> dict[Branch, list[int]]:
        """Return the drafts of growing branches, from what their own searches have drawn."""
        if not self.most_tokens:
            return {}
        computed = [
            (job, slot) for job in jobs for slot in drawing(job) if slot.branch.tokens and slot.branch.twin is None
        ]
        room = self.most_rows - len(computed)
        if room <= 0:
            return {}
        leads, found = {job: lead(job) for job, _ in computed}, dict[Branch, list[int]]()
        for job, slot in computed:
            branch = slot.branch
            left = min(leads[job], slot.request.max_new_tokens) - len(branch.tokens) - 1
            most = int(min(left, slot.reach, self.most_tokens))
            if most > 0 and (draft := _history_of(job).draft(last_tokens(branch), most)):
                found[branch] = draft
        each = room // max(1, len(found))
        return {branch: draft[:each] for branch, draft in found.items()} if each > 0 else {}

    def note(self, job: Job, branch: Branch) -> None:
        """Draft from ``branch``, which has ended, from now on."""
        if self.most_tokens:
            _history_of(job).add(last_tokens(branch.parent), branch.tokens)

    def learn(self, slot: Slot, drafted: int, accepted: int) -> None:
        """Reach further behind a draft that was right to its end, and as far as it was right otherwise."""
        if drafted:
            slot.reach = min(2 * slot.reach, self.most_tokens) if accepted == drafted else max(1, accepted)


def _history_of(job: Job) -> History:
    """What ``job`` has read and drawn, beginning with its prompt."""
    if job.history is None:
        job.history = History()
        job.history.add((), job.load()["input_ids"][0].tolist())
    return job.history


def lead(job: Job) -> float:
    """How many tokens a candidate may have while others have fewer.

    Without drafts, all candidates of a search have equally many until they end, and when a limit of drawn tokens is
    reached, all stop there. Up to this number the limit can't be reached, however long the others get.
    """
    limits = [slot.request.limit.generated_tokens for slot in job.slots if slot.request.limit]
    least = min((limit for limit in limits if limit is not None), default=math.inf)
    if math.isinf(least):
        return least
    lengths = [len(slot.branch.tokens) for slot in job.slots]
    return (least - 1 - job.usage.generated_tokens + sum(lengths)) // len(lengths)


def drawing(job: Job) -> list[Slot]:
    """The slots that draw in this step. Those that may not lead any further wait until the others have caught up."""
    most = lead(job)
    if math.isinf(most):
        return job.slots
    least = min((len(slot.branch.tokens) for slot in job.slots), default=0)
    return [slot for slot in job.slots if len(slot.branch.tokens) == least or len(slot.branch.tokens) < most]


def may_draw(job: Job, steps: int) -> bool:
    """Whether all slots may draw ``steps`` tokens before one of them has to wait."""
    lengths = {len(slot.branch.tokens) for slot in job.slots}
    return len(lengths) <= 1 or max(lengths) + steps <= lead(job)
