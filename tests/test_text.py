"""Which answers are one answer to a vote or a verdict, and which are not."""

import itertools
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_cot.text import nfkc, normalise

# What it becomes: ways to say it
SPELLINGS: dict[str, list[str]] = {
    "yes": ["yes", "Yes", "YES.", " yes \n", '"Yes"', "**yes**", "“Yes!”", "(yes)", "_yes_", "「yes」", "ｙｅｓ",
            "yes。"],
    "a red circle": ["a red circle", "A  red\ncircle.", "\ta red circle;", "a\u00a0red circle", "a red\u200b circle"],
    "été": ["été", "e\u0301te\u0301", "ÉTÉ", "E\u0301te\u0301.", "é\u00adté"],
    "naïve": ["naïve", "nai\u0308ve", "Naïve"],
    "office": ["office", "oﬃce", "OFFICE"],
    "strasse": ["straße", "STRASSE", "Strasse."],
    "it's": ["it's", "it’s", "It\u2019s.", "it\u2032s"],
    "left-handed": ["left-handed", "left\u2010handed", "left\u2011handed", "left–handed"],
    "3-5": ["3-5", "3–5", "3—5", "3\u22125"],
    "4": ["4", "4.", "4.0", "4.00", "(4)", "4,", "**4**", "４", "4\u200b", "\ufeff4", "+4", "$4$", r"\(4\)", r"\[4\]",
          "$$4$$", r"\boxed{4}", r"$\boxed{4}$", r"\boxed{\text{4}}", r"$\boxed{4}$.", "8/2", "4/1", "`4`", "④"],
    "-4": ["-4", "-4.0", "(-4)", "−4", "–4", "﹣4", "－4", "$-4$", "- 4", r"\boxed{-4}", "-8/2"],
    "0": ["0", "0.0", "-0", ".0", "0/5", "０"],
    "1000": ["1000", "1,000", "1,000.0", "1000.", "1,000.00.", "1\u00a0000", "1\u202f000", "1\u2009000", "1'000",
             "1’000", "$1{,}000$", "１，０００"],
    "1234567.5": ["1234567.5", "1,234,567.50", "1\u202f234\u202f567.5", "1'234'567.50"],
    "0.5": ["0.5", ".5", "0.50", ".50.", "1/2", "½", r"\frac{1}{2}", r"$\frac{1}{2}$", r"\dfrac12", r"\tfrac{1}{2}",
            "2/4", "1 / 2", "1⁄2", r"$\frac{\text{1}}{2}$"],
    "-0.5": ["-0.5", "-.5", "-1/2", "−½", r"-\frac{1}{2}"],
    "0.75": ["0.75", "3/4", "¾", ".750", "6/8"],
    "1/3": ["1/3", "⅓", "2/6", r"\frac{1}{3}", "1 / 3"],
    "2.5": ["2.5", "2½", "2 1/2", "2 ½", "5/2", "2.50"],
    "7/3": ["7/3", "2⅓", "2 1/3", "14/6"],
    "12 cm": ["12 cm", "12.0 CM.", "12cm", "12 centimeters", "12 centimetres", "12-centimeter", "１２ｃｍ",
              r"12\text{ cm}", r"12 \mathrm{cm}", "12\u00a0cm", "12㎝"],
    "3 m": ["3 m", "3m", "3 meters", "3 metres", "3.0 meter"],
    "5 km": ["5 km", "5km", "5 kilometers", "5 kilometres"],
    "8 in": ["8 in", "8 inches", "8-inch", "8 inch"],
    "6 ft": ["6 ft", "6 feet", "6-foot", "6ft"],
    "2 kg": ["2 kg", "2kg", "2 kilograms", "2 kilos", "2.0 Kilogram"],
    "250 ml": ["250 ml", "250 mL", "250 millilitres", "250 milliliters", "250ml"],
    "10 min": ["10 min", "10 minutes", "10 mins", "10-minute"],
    "10 s": ["10 s", "10 seconds", "10 sec", "10s"],
    "60 km/h": ["60 km/h", "60 kmh", "60 kph", "60 kilometers per hour"],
    "1/3 m": ["1/3 m", "1/3 meters", "⅓ m"],
    "0.5 l": ["0.5 l", "1/2 liter", "½ litre", "0.5L"],
    "90°": ["90°", "90 °", "90 degrees", "90 deg", r"90^\circ", r"$90^{\circ}$", "90º", "90 degree"],
    "20°c": ["20°C", "20 °C", "20 degrees Celsius", "20℃", "20 ℃", "20 degrees C"],
    "68°f": ["68°F", "68 °F", "68 degrees Fahrenheit", "68℉"],
    "50%": ["50%", "50.0%", "50 %", "50 percent", "50 per cent", "50％", r"50\%", r"$50\%$", "100/2%"],
    "12.5%": ["12.5%", "12.50 percent", "25/2 %"],
    "$1500": ["$1500", "$1,500.00", "1500 dollars", "1,500 USD", "US$1,500", r"\$1500", "USD 1500", "$ 1500"],
    "$-5": ["-$5", "$-5", "-5 dollars", "−$5.00"],
    "€20": ["€20", "20 €", "20 euros", "EUR 20", "20€", "20.00 EUR"],
    "10^2": ["10²", "10^2", "10^{2}", "$10^{2}$"],
    "x^2": ["x²", "x^2", "$x^{2}$", "X²"],
    "10^-3": ["10⁻³", "10^-3", "10^{-3}"],
    "2π": ["2π", r"2\pi", r"$2\pi$"],
    "b": ["B", "b", "(B)", "B.", "B)", "(b).", "B:", "**B.**", "（B）", "B。", "Ｂ", "$B$", r"\boxed{B}", r"\text{B}",
          "(B).", r"$\boxed{\text{B}}$"],
    "c": ["(C) a cat", "C. a cat", "C: A cat.", "**C.** a cat", "**C**. a cat", "（C） a cat"],
    "?": ["?"],
    "": ["", " \n", "\u200b"],
    "[0, 1": ["[0, 1)", "[0,  1)", r"\left[0, 1\right)"],
    "007": ["007", "007."],
    "42": [r"The answer is \boxed{42}.", "<|begin_of_box|>42<|end_of_box|>", r"\boxed{7}? No, \fbox {42}, since 6 * 7",
           "It is <|begin_of_box|> 42 <|end_of_box|> apples"],
    "0.125": [r"so \boxed{\frac{1}{8}} of it"],
    r"\boxed{5": [r"\boxed{5"],
    "5.5.1": ["5.5.1"],
    "24/7": ["24/7"],
    "1/0": ["1/0"],
}  # fmt: skip
EQUAL = [(text, expected) for expected, texts in SPELLINGS.items() for text in texts]


@pytest.mark.parametrize("text, expected", EQUAL)
def test_one_spelling(text, expected):
    assert normalise(text) == expected


def test_the_tables_are_as_large_as_they_claim():
    assert len(EQUAL) >= 250 and len(list(itertools.combinations(SPELLINGS, 2))) > 1000
    assert len(DIFFERENT) >= 60


def test_answers_of_the_table_that_differ_stay_different():
    """Any two rows: more than a thousand pairs."""
    found = {expected: normalise(texts[0]) for expected, texts in SPELLINGS.items()}
    assert len(set(found.values())) == len(SPELLINGS)


DIFFERENT = [
    ("4", "-4"), ("40", "4"), ("5", ".5"), ("4.05", "4.5"), ("1,000", "1.000"),  # English: one thousand, and one
    ("50%", "50"), ("50%", "0.5"), ("3 cm", "3 m"), ("3 m", "3 min"), ("3 m", "3 mm"), ("3 in", "3 min"),
    ("3 g", "3 kg"),
    ("3", "3 m"), ("007", "7"), ("[0, 1)", "(0, 1]"), ("A", "B"), ("(A) and (C)", "(A)"), ("A. and C.", "A."),
    ("a cat", "A."), ("D.C.", "D."), ("C:x", "C"), ("I. Newton", "I. Kant"), ("yes", "no"), ("10²", "102"),
    ("2½", "21/2"), ("x²", "x2"), ("1/2", "1/3"), ("1/3", "0.33"), ("1/3", "0.333333"), ("2/3", "3/2"),
    ("1 1/2", "11/2"),
    ("$5", "5"), ("$5", "€5"), ("$5", "$-5"), ("20°C", "20°F"), ("20°", "20°C"), ("été", "ete"), ("naïve", "naive"),
    ("resume", "résumé"), ("3-5", "35"), ("3 5", "35"), ("1 000", "1,00"), ("1,00", "100"), ("1.000.000", "1,000,000"),
    ("192.168.0.1", "192.168.0.10"), ("2.10", "2.10.0"), ("x = 4", "x = -4"), ("not red", "red"), ("9/11", "11/9"),
    ("10 m/s", "10 m"), ("12:30", "12.30"), ("1e3", "13"), ("left", "right"), ("two", "to"), ("5g", "5 kg"),
    (r"\frac{1}{2}", r"\frac{2}{1}"), (r"\boxed{4}", r"\boxed{5}"), (r"\sqrt{2}", "2"), ("2π", "2"), ("10^3", "10^-3"),
    ("㎏", "㎜"), ("B", "β"), ("O", "0"), ("l", "1"), ("a.b", "ab"), ("co-op", "coop"), ("6 ft", "6 in"),
    ("half", "0.5"),
    ("60 km/h", "60 mph"), ("-0.5", "0.5"), ("3/4 time", "0.75 time"), ("#1", "1"), ("C#", "C"), ("C++", "C"),
]  # fmt: skip


@pytest.mark.parametrize("one, other", DIFFERENT)
def test_different_answers_stay_different(one, other):
    assert normalise(one) != normalise(other)


@pytest.mark.parametrize("text", ["192.168.0.10", "1,00", "1,0000", "2.10.0", "x2.0", "3,4", "24/7", "a/b", "9/0"])
def test_what_only_looks_like_a_number_is_left_alone(text):
    assert normalise(text) == text


@given(st.integers(-(10**12), 10**12), st.integers(0, 3))
def test_integers_in_every_format(number, zeros):
    fraction = "." + "0" * zeros
    forms = [f"{number:,}{fraction}", f"{number}{fraction}.", f"{number:,}".replace(",", "\u202f"), f"${number}$"]
    forms += [rf"\boxed{{{number:,}}}", f"{number}/1", f"{number}".translate({ord("-"): "−"})]
    assert {normalise(form) for form in forms} == {str(number)}


@given(st.integers(0, 999), st.integers(1, 400), st.integers(1, 9))
def test_fractions_in_every_format(above, below, factor):
    forms = [
        f"{above}/{below}",
        rf"\frac{{{above}}}{{{below}}}",
        f"{above * factor} / {below * factor}",
        f"{above}⁄{below}",
    ]
    (found,) = {normalise(form) for form in forms}
    assert eval(found) == pytest.approx(above / below)


@given(st.text(alphabet="abcdeABIxyz019.,:;()*!? \n'\""))
def test_case_and_space_never_matter(text):
    assert normalise(text) == normalise(f"\n {text.swapcase().replace(' ', '  ')} ")


@given(st.text(max_size=40))
def test_any_text_has_a_spelling(text):
    assert isinstance(normalise(text), str)


def test_long_answers_do_not_take_the_square_of_their_length():
    for text in ("9" * 100_000, "1/" * 50_000, "$" * 100_000, r"\frac{" * 20_000, "(" * 100_000, "a " * 50_000,
                 r"\boxed{" * 15_000, r"\boxed{" * 9_000 + "}" * 8_999, "a" + "\u0300\u0327" * 50_000):  # fmt: skip
        normalise(text)


@given(st.text("ae\u0301\u0327\u0344①½가\u1100\ufdfa", max_size=25))
def test_few_marks_are_composed_as_unicode_says(text):
    assert nfkc(text) == unicodedata.normalize("NFKC", text)


def test_of_many_marks_the_rest_is_left_out():
    assert nfkc("a" + "\u0327" * 99) == "a" + "\u0327" * 30
