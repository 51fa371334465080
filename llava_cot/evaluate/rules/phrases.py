"""Read what a text says outright: its boxes, its answer phrases, its words. All patterns take linear time."""

import re
from collections import deque
from collections.abc import Iterator

from llava_cot.text import nfkc, normalise

LAST_PHRASES = 8
BEHIND = 400  # characters

_EMPHASIS = re.compile(r"\*\*|__|`|(?<!\S)\*(?=\S)|(?<=\S)\*(?!\S)")
_TYPOGRAPHY = str.maketrans(dict.fromkeys("\u2018\u2019", "'") | dict.fromkeys("\u201c\u201d", '"') | {"\u2212": "-"})
_SPACE = re.compile(r"[^\S\n]+")
_BREAK = re.compile(r" ?\n\s*")
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{|<\|begin_of_box\|>")

_ANSWER = re.compile(
    r"\b(?:answer|option|choice|solution|result)(?: letter| number)?"
    r"(?: (?:is|was|must be|should be|would be|will be)\b(?! not\b| neither\b| unclear\b)(?: therefore\b| thus\b)?:?"
    r"| ?:| ?=) ?",
    re.IGNORECASE,
)
# What stands before "the answer is" if that is not said but denied, asked or supposed
_HEDGE = re.compile(
    r"(?:\b(?:not|never|if|whether|unless|doubt|assuming|suppose)\b|n't\b)[^.,;:!?\n]{0,30}$", re.IGNORECASE
)
_SENTENCE_END = re.compile(r"[.!?;](?=\s|$)|\n")
_WORD = re.compile(r"(?<![\w)])-?[0-9]+(?:[.,][0-9]+)*|\w+|[^\w\s]")
_MEANINGFUL = frozenset("-+%$€£¥°/=<>^")  # signs that are not just punctuation


def plain(text: str) -> str:
    """Return ``text`` with usual quotes, single spaces, and without Markdown's emphasis."""
    text = _EMPHASIS.sub("", nfkc(text).translate(_TYPOGRAPHY))
    return _BREAK.sub("\n", _SPACE.sub(" ", text)).strip()


def boxed(text: str) -> str | None:
    """Return what stands in the last answer box, such as ``\\\\boxed{4}``, in normal spelling; None without a box."""
    boxes = deque(_BOX.finditer(text), maxlen=LAST_PHRASES)
    return normalise(text[boxes[0].start() :]) if boxes else None


def statements(text: str) -> Iterator[tuple[int, str]]:
    """Yield where each phrase such as "the answer is" stands and what follows it, the last one first.

    ``text`` is ``plain``. Only the last phrases and the first words behind them are read, or a long answer would take
    quadratic time.
    """
    for phrase in reversed(deque(_ANSWER.finditer(text), maxlen=LAST_PHRASES)):
        if not is_hedged(text, phrase.start()):
            yield phrase.start(), text[phrase.end() : phrase.end() + BEHIND]


def is_hedged(text: str, at: int) -> bool:
    """Whether the statement that begins ``at`` is denied, asked or only supposed, as in "if the answer is"."""
    return _HEDGE.search(text[max(0, at - 60) : at]) is not None


def sentence(text: str) -> str:
    """Return ``text`` up to the end of its first sentence or line."""
    return _SENTENCE_END.split(text, maxsplit=1)[0]


def words(text: str) -> list[str]:
    """Return the words, numbers and meaningful signs of ``text``; "1,000.0" and "1000" are equal numbers."""
    text = nfkc(text).translate(_TYPOGRAPHY).casefold()
    found = [word for word in _WORD.findall(text) if word[-1].isalnum() or word in _MEANINGFUL]
    return [normalise(word) if word[-1].isdigit() and not word.isalnum() else word for word in found]
