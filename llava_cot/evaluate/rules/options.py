"""Find the one option that an answer names, by letter or by text."""

import re
from collections.abc import Mapping, Sequence

from llava_cot.evaluate.rules.phrases import boxed, is_hedged, plain, sentence, statements, words

Found = tuple[str | None, str]  # a letter, or None for several or none, and the rule

_ENDS = r"(?!\w|'\w|-\w)"  # a letter of an option is no part of a word, as in "A's" and "B-side"
_LETTER = re.compile(
    r"[\s(\[\"'{$]*(?i:(?:option|choice|letter) )?[(\[\"']?([A-Za-z])" + _ENDS + r"([)\].:,;\"'}$!]*+)(?![A-Za-z_])"
)
_OTHER = re.compile(r" ?(?:or|and|/|&|,) ?[(\[\"']?([A-Z])" + _ENDS)
# "A" and "I" are words too. They are letters of options if no word follows, or one of these.
_WORDLIKE = frozenset("AI")
_AFTER_A_LETTER = re.compile(
    r"$|\n|/| [-=/(]| (?:because|since|as|for|which|that|due|given|based|and|or|but|with|in)\b", re.IGNORECASE
)
# What is said of an option does not name it: "B is too small"
_VERB = re.compile(
    r" (?:(?:is|was|does|would|could|must|may|might|can|has|seems|looks|fits)(?:n't)?|cannot|can't|won't)\b",
    re.IGNORECASE,
)
_IS_RIGHT = re.compile(
    r"(?<![\w'])[(\[\"']?([A-Z])[)\]\"']? (?:is|must be|would be|seems) "
    r"(?:the )?(?:most |only )?(?:correct|right|best|accurate|appropriate|answer)\b"
)
_CHOSEN = re.compile(
    r"\b(?i:(?:choose|chose|choosing|pick|select|go with)(?: (?:option|choice|answer|letter))?) [(\[\"']?([A-Z])"
    + _ENDS
)
_MARKED = re.compile(r"\(([A-Z])\)|\*\*\(?([A-Z])(?:[).:]|\*\*)")
_LAST = re.compile(r"(?<![\w'/])([A-Z])[)\].\"'!]*$")
_ARTICLES = frozenset({"a", "an", "the"})
_NEGATIONS = frozenset({"not", "no", "never", "without", "neither", "nor"})
SEVERAL = "several options"


def find_option(answer: str, choices: Mapping[str, str]) -> Found:
    """Return the letter of the option that ``answer`` names and the rule that found it.

    The rules are, in this order: what stands in an answer box; the last phrase such as "the answer is", with a letter
    or an option's text behind it, or "B is correct"; a leading letter; the only letter in parentheses or bold; the only
    option whose text occurs, word by word and not denied; a letter at the end. A rule that finds two options ends the
    search without one.
    """
    text = plain(answer)
    if (box := boxed(answer)) is not None:
        return _at_start(box, choices, "box") or _by_text(box, choices, "box") or (None, "a box without an option")
    for rule in (_stated, _leading, _marked):
        if found := rule(text, answer, choices):
            return found
    return _by_text(text, choices, "option text") or _at_end(text, choices) or (None, "no option")


def _stated(text: str, answer: str, choices: Mapping[str, str]) -> Found | None:
    """The last statement; of two kinds of statements, the one that stands last."""
    named = [
        (match.start(), match[1])
        for pattern in (_IS_RIGHT, _CHOSEN)
        for match in pattern.finditer(text)
        if match[1] in choices and not is_hedged(text, match.start())
    ]
    last_named = max(named, default=None)
    for at, rest in statements(text):
        if last_named and last_named[0] >= at:
            break
        if found := _at_start(rest, choices, "answer phrase") or _by_text(sentence(rest), choices, "answer phrase"):
            return found
    return (last_named[1], "answer phrase") if last_named else None


def _leading(text: str, answer: str, choices: Mapping[str, str]) -> Found | None:
    found = _at_start(text, choices, "leading letter")
    if found and len(_listed(text, choices)) > 1:
        return None, SEVERAL  # it repeats the options
    return found


def _marked(text: str, answer: str, choices: Mapping[str, str]) -> Found | None:
    marked = {match[1] or match[2] for match in _MARKED.finditer(answer)} & set(choices)
    if len(marked) > 1:
        return None, SEVERAL
    return (marked.pop(), "marked letter") if marked else None


def _at_end(text: str, choices: Mapping[str, str]) -> Found | None:
    last = _LAST.search(text, max(0, len(text) - 20))
    if not last or last[1] not in choices or is_hedged(text, last.start()):
        return None
    return last[1], "last word"


def _at_start(text: str, choices: Mapping[str, str], rule: str) -> Found | None:
    """The letter that ``text`` begins with; no letter if a second one or another option's text contradicts it."""
    if not (match := _LETTER.match(text)) or (letter := match[1].upper()) not in choices:
        return None
    after, mark = text[match.end() :], match[2]
    said, own = words(sentence(after)), words(choices[letter])
    if letter in _WORDLIKE and not mark and not _AFTER_A_LETTER.match(after):
        return None
    if not set(mark) & set(".:;,!") and _VERB.match(after):
        return None
    other = _OTHER.match(mark[-1:] * (mark[-1:] == ",") + after)
    if other and other[1] in choices and other[1] != letter:
        return None, SEVERAL
    if said and said != own and any(said == words(text) for text in choices.values()):
        return None, "the letter of one option and the text of another"
    return letter, rule


def _listed(text: str, choices: Mapping[str, str]) -> list[str]:
    """The letters of the options that stand in ``text`` with letter, mark and text."""
    patterns = {letter: rf"(?<!\w){letter}[).:]+ ?{re.escape(plain(own))}" for letter, own in choices.items() if own}
    return [letter for letter, pattern in patterns.items() if re.search(pattern, text, re.IGNORECASE)]


def _by_text(text: str, choices: Mapping[str, str], rule: str) -> Found | None:
    """The option whose text occurs in ``text``. One within another's text, as "cat" in "black cat", does not."""
    said, found = words(text), set[str]()
    widest = [0] * len(said)  # of the texts that occur at each word
    for letter, own in sorted(_texts(choices), key=lambda option: -len(option[1])):
        for start in _places(own, said):
            end = start + len(own)
            if min(widest[start], widest[end - 1]) > len(own):
                continue
            widest[start:end] = [max(width, len(own)) for width in widest[start:end]]
            if not _is_denied(said, start):
                found.add(letter)
    if len(found) > 1:
        return None, SEVERAL
    return (found.pop(), rule) if found else None


def _texts(choices: Mapping[str, str]) -> list[tuple[str, list[str]]]:
    return [(letter, own) for letter, text in choices.items() if (own := _without_articles(words(text)))]


def _without_articles(own: list[str]) -> list[str]:
    return own[1:] if len(own) > 1 and own[0] in _ARTICLES else own


def _places(own: Sequence[str], said: Sequence[str]) -> list[int]:
    return [at for at, word in enumerate(said) if word == own[0] and [*said[at : at + len(own)]] == own]


def _is_denied(said: Sequence[str], at: int) -> bool:
    """Whether "not", "rather than" and the like stand before the word at ``at``, but for an article."""
    before = [*said[max(0, at - 4) : at]]
    while before and before[-1] in _ARTICLES:
        before.pop()
    if not before:
        return False
    return before[-1] in _NEGATIONS or before[-1] == "t" or before[-2:] in (["rather", "than"], ["instead", "of"])
