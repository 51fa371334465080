"""The bytes that each token adds to a text, and the automaton that finds stop tags in them."""

import re
from collections.abc import Collection, Sequence
from itertools import pairwise
from typing import Any

from llava_cot_kernels.stage_tags import StageTags


class Vocabulary:
    """The pieces of text that a tokenizer's tokens stand for.

    A special token adds nothing to a text, unless it spells ``visible`` strings or a part of one: a fine-tune may have
    added its stage tags as special tokens.

    Attributes:
        token_bytes: the bytes that each token id adds to a text, in id order.

    Raises:
        TypeError, ValueError: see ``StageTags.from_tokenizer``.
        ValueError: the tokenizer has no tokens that spell one of the ``visible`` strings.
    """

    def __init__(self, tokenizer: Any, visible: Collection[str]) -> None:
        plain = StageTags.from_tokenizer(tokenizer, [])
        data = bytes(plain.token_bytes.tolist())
        self.token_bytes = [data[start:end] for start, end in pairwise(plain.token_offsets.tolist())]
        for token, added in tokenizer.added_tokens_decoder.items():
            if added.special and _spells(added.content, visible):
                self.token_bytes[token] = added.content.encode()
        for text in visible:
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            written = b"".join(self.token_bytes[token] for token in ids)
            if text.encode() not in written:  # a SentencePiece tokenizer puts a space before it
                raise ValueError(
                    f"grammar must have tags that the tokenizer can spell, got {text!r}, of which it makes {written!r}"
                )

    def stop_tags(self, tags: Sequence[str]) -> StageTags:
        """Return the automaton that finds ``tags`` in sampled tokens."""
        return StageTags(self.token_bytes, tags)


def _spells(content: str, visible: Collection[str]) -> bool:
    """Whether ``content`` is a part of a ``visible`` string, or consists of such strings and white space."""
    part = content.strip()
    rest = re.sub("|".join(map(re.escape, sorted(visible, key=len, reverse=True))) or "(?!)", "", content)
    return bool(part) and (not rest.strip() or any(part in text for text in visible))
