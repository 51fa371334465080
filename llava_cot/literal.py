"""Tokenize what a user wrote as text, even where it spells a special token.

A tokenizer finds special tokens such as ``<|eot_id|>`` before anything else, wherever they stand. A question that
spells one would end its own turn. ``marked`` therefore puts a mark into each of them, which the tokenizer reads as a
few tokens of its own, and ``unmarked`` takes those tokens out again. What is left spells the same text.
"""

import re
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    import torch
    from transformers import BatchFeature, PreTrainedTokenizerBase

# Of Llama, Qwen, ...: an answer must not spell one, for a model that learnt to would end its turn. A question may.
SPECIAL_TOKEN = re.compile(r"<\|\w+\|>")
MARK = "\ufdd0"  # a noncharacter, which no text may contain


class SpecialTokens(NamedTuple):
    """The special tokens of a tokenizer: their ids, and a pattern that finds the longest one that a text spells."""

    ids: frozenset[int]
    pattern: re.Pattern[str]


# A tokenizer builds its table of added tokens anew at each look, which takes a millisecond.
_KNOWN: "WeakKeyDictionary[PreTrainedTokenizerBase, tuple[int, SpecialTokens]]" = WeakKeyDictionary()


def special_tokens(tokenizer: "PreTrainedTokenizerBase") -> SpecialTokens:
    """Return the special tokens of ``tokenizer``. They are looked up again when it has more tokens than before."""
    size, known = _KNOWN.get(tokenizer, (-1, None))
    if known is None or size != len(tokenizer):
        added = {id: token.content for id, token in tokenizer.added_tokens_decoder.items() if token.special}
        spelled = sorted(added.values(), key=len, reverse=True)
        known = SpecialTokens(frozenset(added), re.compile("|".join(map(re.escape, spelled)) or "(?!)"))
        _KNOWN[tokenizer] = len(tokenizer), known
    return known


def marked(text: str, tokenizer: "PreTrainedTokenizerBase", *, keep: Collection[str] = ()) -> str:
    """Return ``text`` with a mark after the first character of each special token that it spells but those of ``keep``.

    Raises:
        ValueError: ``text`` contains the mark itself.
    """
    if MARK in text:
        raise ValueError("the text must not contain the noncharacter U+FDD0")

    def mark(found: re.Match[str]) -> str:
        return found[0] if found[0] in keep else found[0][0] + MARK + found[0][1:]

    return special_tokens(tokenizer).pattern.sub(mark, text)


def token_ids(text: str, tokenizer: "PreTrainedTokenizerBase", *, add_special_tokens: bool = False) -> list[int]:
    """Tokenize ``text``, parts of which are ``marked``, and return the ids without those of the marks.

    Raises:
        ValueError: see ``unmarked``.
    """
    ids = tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
    return [ids[place] for place in unmarked(ids, text, tokenizer)]


def without_marks(inputs: "BatchFeature", text: str, tokenizer: "PreTrainedTokenizerBase") -> "dict[str, torch.Tensor]":
    """Return a processor's inputs for one ``text``, without the tokens of its marks."""
    if MARK not in text:
        return dict(inputs)
    shape = inputs["input_ids"].shape
    kept = unmarked(inputs["input_ids"][0].tolist(), text, tokenizer)
    return {name: tensor[:, kept] if tensor.shape[:2] == shape else tensor for name, tensor in inputs.items()}


def unmarked(ids: Sequence[int], text: str, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return the places of ``ids``, the tokens of ``text``, that do not belong to a mark.

    Raises:
        ValueError: the tokenizer did not read every mark as tokens of its own.
    """
    if MARK not in text:
        return list(range(len(ids)))
    mark, kept, found = _mark_ids(tokenizer), list[int](), 0
    at = 0
    while at < len(ids):
        if mark and list(ids[at : at + len(mark)]) == mark:
            at, found = at + len(mark), found + 1
        else:
            kept.append(at)
            at += 1
    if found != text.count(MARK):
        raise ValueError("the text must not spell a special token, since this tokenizer can't read one as text")
    return kept


def _mark_ids(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return the tokens of a mark that stands between other characters."""
    once, twice = (tokenizer(f"<{MARK * n}|", add_special_tokens=False)["input_ids"] for n in (1, 2))
    length = len(twice) - len(once)
    same = next((at for at, (a, b) in enumerate(zip(once, twice)) if a != b), len(once))
    return once[same - length : same]
