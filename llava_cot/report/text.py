"""Show a model's text as HTML: escaped and folded, with dim tags and with marks where it differs from another text."""

import re
from collections.abc import Sequence
from difflib import SequenceMatcher
from html import escape
from itertools import groupby

FOLD = 400  # characters of a long text that are shown unfolded
DIFF_WORDS = 2000  # longer texts are not compared, because that takes quadratic time


def to_html(text: str, kept: str | None = None, tags: Sequence[str] = (), *, fold: bool = True) -> str:
    """Return ``text`` as HTML. ``kept`` is the text to compare it with, if any; ``tags`` are those of the grammar."""
    text = text.strip()
    pieces = _marked(text, kept, tags)
    if not fold or len(text) <= 1.5 * FOLD:
        return f'<div class="text">{_html(pieces)}</div>'
    head, rest = _split(pieces, FOLD)
    more = f'<span class="more">… {len(text) - FOLD:,} more characters</span>'
    return f'<details class="text"><summary>{_html(head)}{more}</summary>{_html(rest)}</details>'


def _marked(text: str, kept: str | None, tags: Sequence[str]) -> list[tuple[str, str]]:
    """Split the text into pieces, each with the HTML element that it goes into ("" for none)."""
    # A tag may begin with another tag, or contain spaces.
    alternatives = [*map(re.escape, sorted(tags, key=len, reverse=True)), r"\s+"]
    pieces = re.compile(f"({'|'.join(alternatives)})")
    words = [piece for piece in pieces.split(text) if piece]
    kinds = ["span" if piece in tags else "" for piece in words]
    if kept is not None:
        spoken = [at for at, piece in enumerate(words) if not pieces.fullmatch(piece)]
        others = [piece for piece in pieces.split(kept) if piece and not pieces.fullmatch(piece)]
        if max(len(spoken), len(others)) <= DIFF_WORDS:
            for tag, low, high, _, _ in SequenceMatcher(None, [words[at] for at in spoken], others).get_opcodes():
                for at in spoken[low:high] if tag != "equal" else ():
                    kinds[at] = "mark"
            for at in range(1, len(words) - 1):
                if words[at].isspace() and kinds[at - 1] == kinds[at + 1] == "mark":  # two words, one mark
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
    runs = (
        (kind, escape("".join(piece for piece, _ in run))) for kind, run in groupby(pieces, key=lambda pair: pair[1])
    )
    return "".join(f"<{kind}>{html}</{kind}>" if kind else html for kind, html in runs)
