"""What cells of benchmarks' files hold: text, letters and lists. Nothing is evaluated."""

import ast
import json
import math
from collections.abc import Mapping, Sequence
from string import ascii_uppercase
from typing import Any

from llava_cot.evaluate.files.table import Row

MISSING = frozenset(("", "nan", "NaN"))  # what pandas and Hugging Face's conversions write for nothing
LONGEST_LIST = 10_000  # characters
MOST_DECIMALS = 100


def text(row: Row, *names: str) -> str | None:
    """Return the first of the columns that holds something, as text, or None.

    Raises:
        ValueError: a cell is neither text nor a number.
    """
    for name in names:
        value = row.get(name)
        if value is None:
            continue
        if not isinstance(value, str):
            value = _number(value, name)
        if value not in MISSING and not value.isspace():
            return value
    return None


def _number(value: Any, name: str) -> str:
    """A number as text. Pandas and parquet turn integers into floats where one of a column is missing."""
    if not isinstance(value, (int, float)):
        raise ValueError(f"{name} must be text, got {type(value).__name__}")
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def needed(row: Row, *names: str) -> str:
    """Return the first of the columns that holds something, as text.

    Raises:
        ValueError: none does.
    """
    found = text(row, *names)
    if found is None:
        raise ValueError(f"it has no {names[0]}")
    return found


def whole_number(value: str, name: str) -> int:
    """Return an integer of at most 18 digits.

    Raises:
        ValueError: ``value`` is none.
    """
    plain = value.strip()
    if not (plain.isascii() and plain.isdigit() and len(plain) <= 18):
        raise ValueError(f"{name} must be a whole number, got {value!r:.80}")
    return int(plain)


def decimal_places(row: Row) -> int | None:
    """Return the precision of a row's answer, which a file may have as a float; None if it says nothing.

    Raises:
        ValueError: it is no whole number up to 100.
    """
    value = text(row, "precision")
    if value is None:
        return None
    places = whole_number(value.strip().removesuffix(".0"), "precision")
    if places > MOST_DECIMALS:
        raise ValueError(f"precision must be at most {MOST_DECIMALS} decimal places, got {places}")
    return places


def lettered(options: Sequence[Any]) -> dict[str, str]:
    """Name options A, B, ... in order.

    Raises:
        ValueError: there are more than 26.
    """
    if len(options) > len(ascii_uppercase):
        raise ValueError(f"it must have at most {len(ascii_uppercase)} choices, got {len(options)}")
    return {letter: str(option) for letter, option in zip(ascii_uppercase, options)}


def options_of(row: Row) -> dict[str, str]:
    """The options of a row that has a column for each, A, B, ..."""
    found = ((letter, text(row, letter)) for letter in ascii_uppercase if letter in row)
    return {letter: option for letter, option in found if option is not None}


def choice_of(answer: str, choices: Mapping[str, str]) -> str:
    """Return the letter that ``answer`` is.

    Raises:
        ValueError: it is not the letter of a choice.
    """
    letter = answer.strip()
    if letter not in choices:
        raise ValueError(f"its answer must be the letter of a choice, one of {list(choices)}, got {answer!r:.80}")
    return letter


def list_of(value: Any, name: str) -> list[Any]:
    """Return a list that is one, or that is written as a Python literal or as JSON. A missing one is empty.

    Raises:
        ValueError: it is none.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return []
    if isinstance(value, str):
        if value.strip() in MISSING:
            return []
        value = _literal(value, name)
        if value is None:
            return []
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{name} must be a list, got {type(value).__name__}")
    return list(value)


def _literal(value: str, name: str) -> Any:
    if len(value) > LONGEST_LIST:
        raise ValueError(f"{name} must have at most {LONGEST_LIST} characters, got {len(value)}")
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(value.strip())
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        raise ValueError(f"{name} must be a list, got {value!r:.80}") from None
