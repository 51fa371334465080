"""A subset of a grid of test cases in which every value of every parameter occurs, or every pair of values."""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations


def covering(cases: Sequence[Mapping[str, int]], strength: int) -> list[int]:
    """Which of ``cases`` (a number for the value of each parameter, by its name) to keep, in order.

    ``strength`` values that occur together in a case occur together in one that is kept. Of the cases that add most,
    the one whose values have been kept least is next, so that no value is only ever met with the same other.
    """
    parts = [set(combinations(sorted(case.items()), min(strength, len(case)))) for case in cases]
    missing, kept, uses = set[tuple]().union(*parts), [], Counter[tuple[str, int]]()
    while missing:
        wear = [sum(uses[value] for value in case.items()) for case in cases]
        gains = [(len(part & missing), -worn) for part, worn in zip(parts, wear)]
        best = gains.index(max(gains))
        kept.append(best)
        missing -= parts[best]
        uses.update(cases[best].items())
    return sorted(kept)
