"""What a model wrote, as HTML: escaped, its own tags dim, words that its kept sibling has not marked, and folded."""

import re
from difflib import SequenceMatcher
from html import escape

FOLD = 400  # characters shown of a long text
DIFF_WORDS = 2000  # longer texts are not compared: it takes quadratic time
_PIECES = re.compile(r"(\s+|</?(?:SUMMARY|CAPTION|REASONING|CONCLUSION)>)")


def to_html(text: str, kept: str | None = None) -> str:
    """``kept`` is the text to compare with, if there is one."""
    text = text.strip()
    pieces = _marked(text, kept)
    if len(text) <= 1.5 * FOLD:
        return f'<div class="text">{_html(pieces)}</div>'
    head, rest = _split(pieces, FOLD)
    more = f'<span class="more">… {len(text) - FOLD:,} more characters</span>'
    return f'<details class="text"><summary>{_html(head)}{more}</summary>{_html(rest)}</details>'


def _marked(text: str, kept: str | None) -> list[tuple[str, str]]:
    """The text in pieces, each with the element it goes into ("" for none)."""
    words = [piece for piece in _PIECES.split(text) if piece]
    kinds = ["span" if piece.startswith("<") and _PIECES.fullmatch(piece) else "" for piece in words]
    if kept is not None:
        spoken = [at for at, piece in enumerate(words) if not _PIECES.fullmatch(piece)]
        others = [piece for piece in _PIECES.split(kept) if piece and not _PIECES.fullmatch(piece)]
        if max(len(spoken), len(others)) <= DIFF_WORDS:
            for tag, low, high, _, _ in SequenceMatcher(None, [words[at] for at in spoken], others).get_opcodes():
                for at in spoken[low:high] if tag != "equal" else ():
                    kinds[at] = "mark"
    return list(zip(words, kinds))


def _split(pieces: list[tuple[str, str]], length: int) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    head: list[tuple[str, str]] = []
    left = length
    for at, (piece, kind) in enumerate(pieces):
        if len(piece) >= left:
            return [*head, (piece[:left], kind)], [(piece[left:], kind), *pieces[at + 1 :]]
        head.append((piece, kind))
        left -= len(piece)
    return head, []


def _html(pieces: list[tuple[str, str]]) -> str:
    return "".join(f"<{kind}>{escape(piece)}</{kind}>" if kind else escape(piece) for piece, kind in pieces)
