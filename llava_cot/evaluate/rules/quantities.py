"""Numbers with units, as answers give them."""

import math
import re
from dataclasses import dataclass
from fractions import Fraction

from llava_cot.evaluate.rules.phrases import boxed, plain, sentence, statements
from llava_cot.text import normalise

_MARK = re.compile(r"[(*]*[A-Ha-h][).:]\**\s+(?=\S)")  # of an option, which ``normalise`` would take for the answer
_LEAD = re.compile(r"^[^0-9$€£¥-]{0,30}")
_ALTERNATIVE = re.compile(r"\s*(?:or|to|and|/|-)\s*[$€£¥]?[0-9]")
SEVERAL = "several numbers"
_RESULT = re.compile(r"[=≈] ?([^=≈]{1,40})$")
_NAMES = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
NUMBER_WORDS = {
    name: Fraction(value) for value, name in enumerate(f"{_NAMES} seventeen eighteen nineteen twenty".split())
}
# unit -> (what all of its kind are measured in, how many of those it is)
_SCALES = {
    **{
        "mm": ("m", Fraction(1, 1000)),
        "cm": ("m", Fraction(1, 100)),
        "m": ("m", Fraction(1)),
        "km": ("m", Fraction(1000)),
    },
    **{"mg": ("g", Fraction(1, 1000)), "g": ("g", Fraction(1)), "kg": ("g", Fraction(1000))},
    **{"ml": ("l", Fraction(1, 1000)), "l": ("l", Fraction(1))},
    **{"s": ("s", Fraction(1)), "min": ("s", Fraction(60)), "h": ("s", Fraction(3600))},
}
_UNITS = frozenset({*_SCALES, *"%$€£¥°", "°c", "°f", "in", "ft", "mi", "km/h", "mph"})

_SIGNS = r"[$€£¥]"
_NAMED = "|".join(re.escape(unit) for unit in sorted(_UNITS - {"in"}, key=len, reverse=True))
_NUMBER = re.compile(
    rf"({_SIGNS})?((?<![\w)])-)?(?<![\w.])({_SIGNS})?"
    r"([0-9]{1,300}+(?:\.[0-9]{1,300}+)?)(?:/([0-9]{1,300}+))?(?![\w.]*[0-9])"
    rf"(?: ?(in(?=$|[^\w ])|(?:{_NAMED})(?!\w)))?"
)


@dataclass(frozen=True)
class Quantity:
    """A number and its unit as ``llava_cot.text.normalise`` spells it, or None if it has no unit that is known."""

    value: Fraction
    unit: str | None = None

    def __str__(self) -> str:
        value = str(self.value) if self.value.denominator == 1 else f"{float(self.value):g}"
        return f"{value} {self.unit}" if self.unit else value

    def equals(self, other: "Quantity", precision: int | None) -> bool:
        """Whether both are the same, where units are known, and equal when rounded to so many decimal places."""
        value = self.value
        if self.unit and other.unit and self.unit != other.unit:
            mine, theirs = _SCALES.get(self.unit), _SCALES.get(other.unit)
            if mine is None or theirs is None or mine[0] != theirs[0]:
                return False
            value = value * mine[1] / theirs[1]
        return value == other.value or (
            precision is not None and _round(value, precision) == _round(other.value, precision)
        )


def quantities(text: str) -> list[Quantity]:
    """Return the quantities in a text that ``normalise`` has returned, in order."""
    return [quantity for match in _NUMBER.finditer(text) if (quantity := _quantity(match))]


def _quantity(match: re.Match[str]) -> Quantity | None:
    sign_before, minus, sign, number, below, unit = match.groups()
    if below and not int(below):
        return None
    value = Fraction(number) / int(below or 1) * (-1 if minus else 1)
    return Quantity(value, sign or sign_before or unit)


def unit_of(name: str | None) -> str | None:
    """Return a unit's spelling in ``Quantity``, by any of its names; None if it is not known."""
    if not name:
        return None
    found = quantities(normalise(f"1 {name}"))
    return found[0].unit if len(found) == 1 else None


def find_quantity(answer: str) -> tuple[Quantity | None, str]:
    """Return the one quantity that ``answer`` gives and the rule that found it, or None and why there is none.

    The rules are, in this order: what stands in an answer box; the last phrase such as "the answer is"; the only
    quantity there is; what stands behind the last "=", at the end; a number word, alone or behind an answer phrase.
    """
    if (box := boxed(answer)) is not None:
        found = _only(quantities(box))
        return (found, "box") if found else (None, "a box without one number")
    text = plain(answer)
    for _, rest in statements(text):
        said = spelled(sentence(rest))
        if (word := said.split(" ")[0]) in NUMBER_WORDS:
            return Quantity(NUMBER_WORDS[word]), "answer phrase"
        said = _LEAD.sub("", said, count=1)
        if (match := _NUMBER.match(said)) and (found := _quantity(match)):
            if _ALTERNATIVE.match(said, match.end()) and not _only(quantities(said)):
                return None, SEVERAL
            return found, "answer phrase"
    said = spelled(text)
    if said in NUMBER_WORDS:
        return Quantity(NUMBER_WORDS[said]), "number word"
    everything = quantities(said)
    if found := _only(everything):
        return found, "only number"
    if (result := _RESULT.search(said)) and (found := _only(quantities(result[1]))):
        return found, "result"
    return None, SEVERAL if everything else "no number"


def _only(found: list[Quantity]) -> Quantity | None:
    """The one quantity that is given, maybe several times and not always with its unit."""
    units = {quantity.unit for quantity in found if quantity.unit}
    if len({quantity.value for quantity in found}) != 1 or len(units) > 1:
        return None
    return Quantity(found[0].value, *units)


def spelled(text: str) -> str:
    """Return ``normalise(text)`` without the mark of an option before it, so that "A: 5" is not the option A."""
    return normalise(_MARK.sub("", text, count=1) if _MARK.match(text) else text)


def _round(value: Fraction, places: int) -> int:
    """Round half up, as people do, in units of the last place: 0.125 to two places is 13."""
    whole = math.floor(abs(value) * 10**places + Fraction(1, 2))
    return -whole if value < 0 else whole
