"""Which answers are one answer to a vote, and which are not."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_cot.text import normalise

# What it becomes: ways to say it
SPELLINGS = {
    "yes": ["yes", "Yes", "YES.", " yes \n", '"Yes"', "**yes**", "“Yes!”", "(yes)"],
    "a red circle": ["a red circle", "A  red\ncircle.", "\ta red circle;"],
    "4": ["4", "4.", "4.0", "4.00", "(4)", "4,", "**4**"],
    "1000": ["1000", "1,000", "1,000.0", "1000.", "1,000.00."],
    "1234567.5": ["1234567.5", "1,234,567.50"],
    "0.5": ["0.5", ".5", "0.50", ".50."],
    "-4": ["-4", "-4.0", "(-4)"],
    "12 cm": ["12 cm", "12.0 CM."],
    "$1500": ["$1500", "$1,500.00"],
    "50%": ["50%", "50.0%"],
    "b": ["B", "b", "(B)", "B.", "B)", "(b).", "B:", "**B.**"],
    "c": ["(C) a cat", "C. a cat", "C: A cat.", "**C.** a cat", "**C**. a cat"],
    "?": ["?"],
    "": ["", " \n"],
}  # fmt: skip


@pytest.mark.parametrize(
    "text, expected", [(text, expected) for expected, texts in SPELLINGS.items() for text in texts]
)
def test_one_spelling(text, expected):
    assert normalise(text) == expected


@pytest.mark.parametrize(
    "one, other",
    [
        ("4", "-4"),
        ("40", "4"),
        ("5", ".5"),
        ("4.05", "4.5"),
        ("1,000", "1.000"),  # English: one thousand, and one
        ("50%", "50"),
        ("3 cm", "3 m"),
        ("007", "7"),
        ("[0, 1)", "(0, 1]"),
        ("A", "B"),
        ("(A) and (C)", "(A)"),  # more options than one are not the first of them
        ("A. and C.", "A."),
        ("a cat", "A."),  # an article is no option
        ("D.C.", "D."),
        ("C:x", "C"),
        ("I. Newton", "I. Kant"),
        ("yes", "no"),
    ],
)
def test_different_answers_stay_different(one, other):
    assert normalise(one) != normalise(other)


@pytest.mark.parametrize("text", ["192.168.0.10", "1,00", "1,0000", "2.10.0", "x2.0", "3,4"])
def test_what_only_looks_like_a_number_is_left_alone(text):
    assert normalise(text) == text


@given(st.integers(-(10**12), 10**12), st.integers(0, 3))
def test_integers_in_every_format(number, zeros):
    fraction = "." + "0" * zeros
    assert normalise(f"{number:,}{fraction}") == normalise(f"{number}{fraction}.") == str(number)


@given(st.text(alphabet="abcdeABIxyz019.,:;()*!? \n'\""))
def test_case_and_space_never_matter(text):
    assert normalise(text) == normalise(f"\n {text.swapcase().replace(' ', '  ')} ")
