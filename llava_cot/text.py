"""The text of answers: one spelling for equal answers, and decoding token by token."""

import re
from collections.abc import Callable, Sequence

# An option's letter with its mark, as in "(B) a cat". If a second option follows, the first alone is not the answer.
_OPTION = re.compile(r"[(*]*([a-h])\**[).:]+\**(?=\s|$)(?!.*\b[a-h]\**[).:])")
# A number that is not part of a word, of a longer number or of something like 192.168.0.1.
_NUMBER = re.compile(r"(?<![\w.,])([0-9]{1,3}(?:,[0-9]{3})+|[0-9]+|(?=\.[0-9]))(\.[0-9]+)?(?![.,]?[0-9])")
_SURROUNDING = " .,;:!?'\"`*()\u2018\u2019\u201c\u201d"  # signs, units and square brackets have a meaning and stay


def normalise(text: str) -> str:
    """Return ``text`` in a form for comparing: lower case, single spaces, no surrounding punctuation.

    Numbers are read as in English: "1,000" and "1000.0" become "1000", and ".50" becomes "0.5". The letter of an
    option (A to H) with a mark stands for the whole option: "(B)", "B." and "B: a cat" become "b", as "B" alone does. A
    drawback is that "E. coli" becomes "e". A text of nothing but punctuation keeps it.
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
    """Turns tokens into text as they arrive. A character whose tokens are not complete yet is held back.

    Only the last few tokens are decoded again, so the cost per token does not grow with the text. They are needed
    because the text of a token may depend on the token before it.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._tokens: list[int] = []
        self._start = self._end = 0  # the last tokens whose text is known; new ones are decoded together with them

    def add(self, tokens: Sequence[int], *, is_last: bool = False) -> str:
        """Return the text that ``tokens`` add. ``is_last`` releases what is held back."""
        self._tokens += tokens
        known = self._decode(self._tokens[self._start : self._end])
        text = self._decode(self._tokens[self._start :])
        if not is_last and (len(text) <= len(known) or text.endswith("\ufffd")):
            return ""
        self._start, self._end = self._end, len(self._tokens)
        return text[len(known) :]
