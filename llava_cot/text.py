"""Text of answers: one spelling for what means the same, and text that grows token by token."""

import re
from collections.abc import Callable, Sequence

# An option's letter with its mark, as in "(B) a cat"; where a second one follows, the first alone is not the answer.
_OPTION = re.compile(r"[(*]*([a-h])\**[).:]+\**(?=\s|$)(?!.*\b[a-h]\**[).:])")
# Not a part of a word, of a longer number or of something like 192.168.0.1.
_NUMBER = re.compile(r"(?<![\w.,])([0-9]{1,3}(?:,[0-9]{3})+|[0-9]+|(?=\.[0-9]))(\.[0-9]+)?(?![.,]?[0-9])")
_SURROUNDING = " .,;:!?'\"`*()\u2018\u2019\u201c\u201d"  # signs, units and square brackets carry meaning and stay


def normalise(text: str) -> str:
    """``text`` in lower case, without surrounding punctuation, with single spaces; for comparing, not for showing.

    Numbers are read as in English: "1,000" and "1000.0" are "1000", ".50" is "0.5". An option's letter (A to H) with a
    mark stands for the whole: "(B)", "B.", "B: a cat" are "b", and so is "B" alone (the price: "E. coli" is "e").
    What is nothing but punctuation stays.
    """
    text = " ".join(text.casefold().split())
    if option := _OPTION.match(text):
        return option[1]
    text = _NUMBER.sub(_plain, text)
    return text.strip(_SURROUNDING) or text


def _plain(number: re.Match[str]) -> str:
    fraction = (number[2] or "").rstrip("0").rstrip(".")
    return (number[1].replace(",", "") or "0") + fraction


class Detokeniser:
    """Turns tokens into text as they come. A character that its tokens have not completed yet is held back.

    Only the last few tokens are decoded again, so the cost of a token does not grow with the text. They are kept
    because the text of a token may depend on the one before it.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._tokens: list[int] = []
        self._start = self._end = 0  # of the tokens whose text is known, and that new ones are decoded behind

    def add(self, tokens: Sequence[int], *, is_last: bool = False) -> str:
        """The text that ``tokens`` add. ``is_last`` releases what is held back."""
        self._tokens += tokens
        known = self._decode(self._tokens[self._start : self._end])
        text = self._decode(self._tokens[self._start :])
        if not is_last and (len(text) <= len(known) or text.endswith("\ufffd")):
            return ""
        self._start, self._end = self._end, len(self._tokens)
        return text[len(known) :]
