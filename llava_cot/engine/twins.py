"""Siblings that have drawn the same tokens: one of them is computed for all, until they part."""

from collections.abc import Sequence

from llava_cot.engine.branch import Branch
from llava_cot_kernels.page_pool import PagePool


def part(grown: Sequence[Branch], pool: PagePool, most_new: int) -> None:
    """Give pages of their own to branches that have finished, or have drawn other tokens than their twins.

    Each has drawn up to ``most_new`` tokens in this step. Keys and values of drafts that were not drawn are forgotten.
    """

    def end(branch: Branch) -> tuple[int, ...]:
        """What may tell a branch from its twin: before this step they had the same tokens."""
        return branch.length, *branch.tokens[-most_new:]

    firsts = dict[tuple[Branch, tuple[int, ...]], Branch]()
    for branch in grown:
        twin = branch.twin
        if twin is None or (branch.finish is None and end(branch) == end(twin)):
            continue
        first = firsts.setdefault((twin, end(branch)), branch)
        if first is not branch and branch.finish is None:
            branch.twin = first
        else:
            give_pages(branch, pool)
    for branch in grown:
        if branch.twin is None and pool.length(branch.seq) >= branch.length:
            pool.truncate(branch.seq, branch.length - 1)


def give_pages(branch: Branch, pool: PagePool) -> None:
    """Let ``branch`` share the pages of its twin up to here, and write its own from here on."""
    if branch.twin is not None:
        (branch.seq,) = pool.fork(branch.twin.seq, 1)
        branch.twin = None
