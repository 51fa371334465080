"""Parse the JSON body of a request strictly: what two parsers might read in two ways is refused."""

import json
import math
import re
from typing import Any, NoReturn

from llava_cot.serve.errors import RequestError
from llava_cot.serve.limits import Limits

MAX_DIGITS = 19  # of an integer: those of 2**63 - 1
MAX_NUMBER = 40  # characters of a number with a fraction or an exponent

_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)  # possessive, so that it is linear
_PUNCTUATION = re.compile(rb"[^\[\]{},:]+")


def parse_body(raw: bytes, limits: Limits) -> dict[str, Any]:
    """Return the JSON object that ``raw`` is.

    Raises:
        RequestError: 400. It is not UTF-8, no JSON or no object, is nested too deeply, has too many values, or has a
            key twice in one object, NaN, an infinity, a number that is too long, or half of a surrogate pair.
    """
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise _refused("is not UTF-8") from None
    _check_shape(raw, limits)
    try:
        value = json.loads(
            text,
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_float=_number,
            parse_constant=lambda name: _refuse(f"has {name}, which is no JSON number"),
        )
    except ValueError as error:
        at = f": see position {error.pos}" if isinstance(error, json.JSONDecodeError) else ""
        raise _refused(f"is not valid JSON{at}") from None
    if not isinstance(value, dict):
        raise _refused("must be a JSON object")
    if "\\u" in text:
        _check_surrogates(value)
    return value


def _refused(what: str) -> RequestError:
    return RequestError(400, f"The body {what}.", None, "invalid_json")


def _refuse(what: str) -> NoReturn:
    raise _refused(what)


def _check_shape(raw: bytes, limits: Limits) -> None:
    """Check what would cost the parser its stack or much memory, from the punctuation outside strings alone."""
    marks = _PUNCTUATION.sub(b"", _STRING.sub(b"", raw))
    if sum(marks.count(mark) for mark in (b",", b"[", b"{")) >= limits.max_json_values:
        raise _refused(f"has more than {limits.max_json_values} values")
    depth = 0
    for mark in marks:
        if mark in b"[{":
            depth += 1
            if depth > limits.max_json_depth:
                raise _refused(f"is nested more than {limits.max_json_depth} deep")
        elif mark in b"]}":
            depth -= 1  # below 0 the parser stops before it gets further


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _refused(f"has the key {json.dumps(twice[:100])} twice in one object")
    return found


def _integer(digits: str) -> int:
    if len(digits.lstrip("-")) > MAX_DIGITS:
        raise _refused(f"has an integer of more than {MAX_DIGITS} digits")
    return int(digits)


def _number(text: str) -> float:
    if len(text) > MAX_NUMBER or not math.isfinite(number := float(text)):
        raise _refused(f"has a number that is too large or has more than {MAX_NUMBER} characters")
    return number


def _check_surrogates(value: Any) -> None:
    """Go over all strings and keys; the depth has been checked."""
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise _refused("has half of a surrogate pair") from None
    elif isinstance(value, dict):
        for key, inner in value.items():
            _check_surrogates(key)
            _check_surrogates(inner)
    elif isinstance(value, list):
        for inner in value:
            _check_surrogates(inner)
