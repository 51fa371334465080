"""Tokenize what a user wrote as text, even where it spells a special token.

A tokenizer finds special tokens such as ``<|eot_id|>`` before anything else, wherever they stand. A question that
spells one would end its own turn. ``marked`` therefore puts a mark into each of them, which the tokenizer reads as a
few tokens of its own, and ``unmarked`` takes those tokens out again. What is left spells the same text.
"""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import BatchFeature, PreTrainedTokenizerBase

MARK = "\ufdd0"  # a noncharacter, which no text may contain


def marked(text: str, tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return ``text`` with a mark after the first character of each special token that it spells.

    Raises:
        ValueError: ``text`` contains the mark itself.
    """
    if MARK in text:
        raise ValueError("the text must not contain the noncharacter U+FDD0")
    special = sorted((t.content for t in tokenizer.added_tokens_decoder.values() if t.special), key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, special)) if special else "(?!)")
    return pattern.sub(lambda found: found[0][0] + MARK + found[0][1:], text)


def unmarked(ids: Sequence[int], tokenizer: "PreTrainedTokenizerBase", marks: int) -> list[int]:
    """Return the places of ``ids`` that do not belong to one of ``marks`` marks.

    Raises:
        ValueError: the tokenizer did not read every mark as tokens of its own.
    """
    if not marks:
        return list(range(len(ids)))
    mark, kept, found = _mark_ids(tokenizer), list[int](), 0
    at = 0
    while at < len(ids):
        if mark and list(ids[at : at + len(mark)]) == mark:
            at, found = at + len(mark), found + 1
        else:
            kept.append(at)
            at += 1
    if found != marks:
        raise ValueError("the text must not spell a special token, since this tokenizer can't read one as text")
    return kept


def without_marks(
    inputs: "BatchFeature", tokenizer: "PreTrainedTokenizerBase", marks: int
) -> "dict[str, torch.Tensor]":
    """Return a processor's inputs for one text, without the tokens of its marks."""
    shape = inputs["input_ids"].shape
    kept = unmarked(inputs["input_ids"][0].tolist(), tokenizer, marks)
    return {name: tensor[:, kept] if tensor.shape[:2] == shape else tensor for name, tensor in inputs.items()}


def _mark_ids(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return the tokens of a mark that stands between other characters."""
    once, twice = (tokenizer(f"<{MARK * n}|", add_special_tokens=False)["input_ids"] for n in (1, 2))
    length = len(twice) - len(once)
    same = next((at for at, (a, b) in enumerate(zip(once, twice)) if a != b), len(once))
    return once[same - length : same]
