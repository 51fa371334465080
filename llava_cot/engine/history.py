"""What a search has drawn so far, and what it may draw next because it did so before."""

from collections.abc import Sequence

from llava_cot.engine.branch import Branch

SHORTEST_MATCH = 2  # tokens before a place that must be the same
LONGEST_MATCH = 32  # a longer match says no more
MOST_PLACES = 16  # compared for one draft, the latest first
END = -1  # stands behind every text, and is no token


class History:
    """The texts of one search, indexed by the pairs of tokens in them.

    Candidates that are sampled again after a retrace repeat much of what the search drew before. ``draft`` finds the
    place whose preceding tokens agree with the longest suffix of a text, as prompt lookup and LZ77 do, and returns what
    follows there.
    """

    def __init__(self) -> None:
        self._tokens = list[int]()
        self._latest: dict[tuple[int, int], int] = {}  # the latest place behind a pair
        self._earlier = list[int]()  # for each place, the one before it behind the same pair, or -1

    def add(self, before: Sequence[int], tokens: Sequence[int]) -> None:
        """Note that ``tokens`` were read or drawn after ``before``; of that its last tokens matter."""
        for number, token in enumerate((*before, *tokens, END)):
            place = len(self._tokens)
            pair = tuple(self._tokens[-SHORTEST_MATCH:])
            is_known = number >= max(len(before), SHORTEST_MATCH)
            self._earlier.append(self._latest.get(pair, -1) if is_known else -1)  # type: ignore[arg-type]
            if is_known:
                self._latest[pair] = place  # type: ignore[index]
            self._tokens.append(token)

    def draft(self, text: Sequence[int], most: int) -> list[int]:
        """Return up to ``most`` tokens that may follow ``text``, or none."""
        pair, best, longest = tuple(text[-SHORTEST_MATCH:]), -1, 0
        place = self._latest.get(pair, -1)  # type: ignore[arg-type]
        for _ in range(MOST_PLACES):
            if place < 0 or longest == min(len(text), LONGEST_MATCH):  # an earlier place can't agree with more
                break
            length = self._agreement(text, place)
            if length > longest:
                best, longest = place, length
            place = self._earlier[place]
        if best < 0:
            return []
        found = self._tokens[best : best + most]
        return found[: found.index(END)] if END in found else found

    def _agreement(self, text: Sequence[int], place: int) -> int:
        """How many of the last tokens of ``text`` stand before ``place``."""
        most = min(len(text), place, LONGEST_MATCH)
        for length in range(SHORTEST_MATCH, most):
            if text[-1 - length] != self._tokens[place - 1 - length]:
                return length
        return most


def last_tokens(branch: Branch | None, most: int = LONGEST_MATCH) -> list[int]:
    """Up to ``most`` tokens before the end of ``branch``, of those behind the prompt."""
    found = list[int]()
    while branch is not None and branch.parent is not None and len(found) < most:
        found = branch.tokens[-(most - len(found)) :] + found
        branch = branch.parent
    return found
