"""One spelling for equal answers, so that votes are not split and verdicts do not hang on typography."""

import re
import unicodedata
from fractions import Fraction

# Before compatibility forms are taken apart, which would join a digit with a power or a fraction behind it.
_POWERS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_POWER = re.compile(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+")
_MIXED = re.compile(r"(?<=[0-9])(?=[¼-¾⅐-⅞↉])")
_THIN_THOUSANDS = re.compile(r"(?<=[0-9])[\u00a0\u2009\u202f'\u2019](?=[0-9]{3}(?![0-9]))")
_CHARACTERS = str.maketrans({
    **dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe58\ufe63\uff0d", "-"),
    **dict.fromkeys("\u2018\u2019\u201a\u201b\u2032", "'"),
    **dict.fromkeys("\u201c\u201d\u201e\u201f\u2033\u00ab\u00bb\u300c\u300d\u300e\u300f", '"'),
    "\u3002": ".", "\u3001": ",", "\u2044": "/", "\u2215": "/", "\u00ba": "°", "\u02da": "°",
})  # fmt: skip

_LATEX = [
    (re.compile(r"\\(?:left|right|displaystyle|,|;|!|quad)(?![a-z])|\\ "), ""),
    (re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mathit|boxed|fbox)\s*\{([^{}]*)\}"), r"\1"),
    (re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}"), r"\1/\2"),
    (re.compile(r"\\[dt]?frac\s*([0-9])\s*([0-9])"), r"\1/\2"),
    (re.compile(r"\^\s*\{?\\circ\}?|\\degree"), "°"),
    (re.compile(r"\\([%$#&_])"), r"\1"),
    (re.compile(r"\^\{([^{}]*)\}"), r"^\1"),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\pi(?![a-z])"), "π"),
    (re.compile(r"\\times(?![a-z])|\\cdot(?![a-z])"), "*"),
]
_BOX_OR_BRACE = re.compile(r"(\\(?:boxed|fbox)\s*\{)|<\|begin_of_box\|>|\\?[{}]")
_MATH = [re.compile(p, re.DOTALL) for p in (r"\$\$([^$]+)\$\$", r"\$([^$]+)\$", r"\\\((.+)\\\)", r"\\\[(.+)\\\]")]

# An option's letter with its mark, as in "(B) a cat". If a second option follows, the first alone is not the answer.
_OPTION = re.compile(r"[(*]*([a-h])\**[).:]+\**(?=\s|$)(?!.*\b[a-h]\**[).:])")
# A number that is not part of a word, of a longer number or of something like 192.168.0.1.
_NUMBER = re.compile(r"(?<![\w.,])([0-9]{1,3}(?:,[0-9]{3})+|[0-9]+|(?=\.[0-9]))(\.[0-9]+)?(?![.,]?[0-9])")
_FRACTION = re.compile(r"(-?)(?:([0-9]{1,30}) )?([0-9]{1,30}) ?/ ?([0-9]{1,30})(%|°[cf]?| [a-z/]{1,4})?")
MOST_MARKS = 30  # in a row
_SURROUNDING = " .,;:!?'\"`*_()"  # signs, units and square brackets have a meaning and stay

# What stands behind a number, however it is spelled.
_UNITS = {
    "%": "percent|per cent|pct",
    "°": "degrees?|deg",
    "°c": "degrees? celsius|° ?celsius|degrees? c|° c",
    "°f": "degrees? fahrenheit|° ?fahrenheit|degrees? f|° f",
    "mm": "milli ?met(?:er|re)s?",
    "cm": "centi ?met(?:er|re)s?",
    "m": "met(?:er|re)s?",
    "km": "kilo ?met(?:er|re)s?",
    "in": "inch(?:es)?",
    "ft": "feet|foot",
    "mi": "miles?",
    "mg": "milli ?grams?",
    "g": "grams?|grammes?",
    "kg": "kilo ?grams?|kilos?",
    "ml": "milli ?lit(?:er|re)s?",
    "l": "lit(?:er|re)s?",
    "s": "seconds?|secs?",
    "min": "minutes?|mins?",
    "h": "hours?|hrs?",
    "km/h": "kilo ?met(?:er|re)s? per hour|kmh|kph",
    "mph": "miles? per hour",
}
_UNIT_NAMES = [
    (re.compile(rf"(?<=[0-9]) ?-?(?:{names}|{re.escape(unit)})(?!\w)"), unit if unit[0] in "%°" else f" {unit}")
    for unit, names in sorted(_UNITS.items(), key=lambda item: -len(item[1]))
]
_CURRENCIES = {"$": r"us\$|usd|us dollars?|dollars?", "€": "eur|euros?", "£": "gbp|pounds? sterling", "¥": "jpy|yen"}
_BEFORE = [(re.compile(rf"(?:{names}|{re.escape(sign)}) ?(?=-?[0-9.])"), sign) for sign, names in _CURRENCIES.items()]
_BEHIND = [
    (
        re.compile(rf"(?<![0-9.])(-?(?:[0-9]+\.)?[0-9]+) ?(?:{names}|{re.escape(sign)})(?!\w)"),
        rf"{sign}\1",
    )
    for sign, names in _CURRENCIES.items()
]


def normalise(text: str) -> str:
    """Return ``text`` in a form for comparing: equal answers become equal strings.

    Case, space, quotes, surrounding punctuation, invisible characters, full-width forms, composed accents, kinds of
    dashes, Markdown and LaTeX (``$4$``, ``\\\\boxed{4}``, ``\\\\frac{1}{2}``) do not matter.

    Numbers are read as in English: "1,000" and "1000.0" become "1000", and ".50" becomes "0.5". A lone fraction becomes
    a decimal number if it has few digits ("3/4" and "¾" become "0.75"), else its lowest terms. The common units,
    percent and currencies behind or before a number have one spelling; they stay part of the answer.

    If there is an answer box, such as ``\\\\boxed{4}`` or ``<|begin_of_box|>4<|end_of_box|>``, what stands in the last
    one is the answer, whatever is said around it.

    The letter of an option (A to H) with a mark stands for the whole option: "(B)", "B." and "B: a cat" become "b", as
    "B" alone does. A drawback is that "E. coli" becomes "e". A text of nothing but punctuation keeps it.
    """
    text = _plain_characters(_boxed(text))
    text = _without_latex(text)
    text = " ".join(text.split())
    if option := _OPTION.match(text):
        return option[1]
    text = _NUMBER.sub(_plain_number, text)
    text = text.strip(_SURROUNDING) or text
    for pattern, name in (*_UNIT_NAMES, *_BEHIND, *_BEFORE):
        text = pattern.sub(name, text)
    text = re.sub(r"^-([$€£¥])(?=[0-9])", r"\1-", re.sub(r"^\+ ?(?=[0-9])|(?<=^-) (?=[0-9])", "", text))
    if (fraction := _FRACTION.fullmatch(text)) and (fraction[5] or "").strip() in {"", *_UNITS}:
        text = _decimal(*fraction.groups()[:4]) + (fraction[5] or "")
    return "0" if text == "-0" else text


def nfkc(text: str) -> str:
    """Return ``text`` in NFKC, in linear time.

    Marks that combine are sorted, which takes quadratic time. Of more than 30 in a row the rest is left out: Unicode's
    stream-safe format (UAX #15, section 13) has no more.
    """
    if text.isascii():
        return text
    kept, marks = [], 0
    for character in text:
        marks = marks + 1 if unicodedata.combining(character) else 0
        if marks <= MOST_MARKS:
            kept.append(character)
    return unicodedata.normalize("NFKC", "".join(kept))


def _boxed(text: str) -> str:
    """Return what stands in the last answer box, or ``text`` if it has none. Braces in a box may be nested."""
    opened: list[int | None] = []  # where the text of each open brace starts, if it opens a box
    last: tuple[int, int | None] | None = None
    for token in _BOX_OR_BRACE.finditer(text):
        if token[0] == "<|begin_of_box|>":
            last = token.end(), None
        elif token[0] == "}":
            start = opened.pop() if opened else None
            if start is not None and (last is None or start > last[0]):
                last = start, token.start()
        elif token[0] == "{" or token[1]:
            opened.append(token.end() if token[1] else None)
    if last is None:
        return text
    inner = text[last[0] : last[1]]
    return inner if last[1] is not None else inner.partition("<|end_of_box|>")[0]


def _plain_characters(text: str) -> str:
    text = _THIN_THOUSANDS.sub("", text)
    text = _POWER.sub(lambda power: "^" + power[0].translate(_POWERS), _MIXED.sub(" ", text))
    text = text.translate(_CHARACTERS)
    text = nfkc(nfkc(text).casefold()).translate(_CHARACTERS)
    return "".join(c for c in text if unicodedata.category(c) != "Cf")


def _without_latex(text: str) -> str:
    for _ in range(8):  # from the inside out
        before = text = text.strip()
        for pattern, plain in _LATEX if "\\" in text or "{" in text else ():
            text = pattern.sub(plain, text)
        for pattern in _MATH:
            if found := pattern.fullmatch(text.strip(" .,;*")):
                text = found[1]
        if text == before:
            break
    return text


def _plain_number(number: re.Match[str]) -> str:
    fraction = (number[2] or "").rstrip("0").rstrip(".")
    return (number[1].replace(",", "") or "0") + fraction


def _decimal(sign: str, whole: str | None, above: str, below: str) -> str:
    if int(below) == 0:
        return f"{sign}{above}/{below}"
    value = int(whole or 0) + Fraction(int(above), int(below))
    digits = next((n for n in range(7) if 10**n % value.denominator == 0), 0)
    if digits == 0:
        return f"{sign}{value}"
    decimal = str(value.numerator * 10**digits // value.denominator).rjust(digits + 1, "0")
    return f"{sign}{decimal[:-digits]}.{decimal[-digits:]}"
