"""Turn tokens into text as they arrive."""

from collections.abc import Callable, Sequence


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
