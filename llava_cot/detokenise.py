"""Turn tokens into text as they arrive."""

import codecs
from collections.abc import Sequence


class Detokeniser:
    """Turns tokens into text as they arrive. A character whose bytes are not complete yet is held back.

    So what has been returned never changes, and equals the text of all tokens at once. A space at the start is kept.
    Bytes that are no UTF-8 become U+FFFD. A character that is never completed is left out.

    Args:
        token_bytes: the bytes that each token id adds to the text, in id order. Ids past its end add none.
    """

    def __init__(self, token_bytes: Sequence[bytes]) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, tokens: Sequence[int]) -> str:
        """Return the text that ``tokens`` add."""
        size = len(self._token_bytes)
        return self._decoder.decode(b"".join(self._token_bytes[token] for token in tokens if token < size))
