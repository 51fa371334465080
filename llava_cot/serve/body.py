"""Parse the JSON body of a request strictly: what two parsers might read in two ways is refused."""

import asyncio
import json
import math
import re
from typing import Any, NoReturn

from starlette.requests import Request

from llava_cot.serve.errors import RequestError
from llava_cot.serve.limits import Limits
from llava_cot.serve.validate import Model, validated

MAX_DIGITS = 19  # of an integer: those of 2**63 - 1
MAX_NUMBER = 40  # characters of a number with a fraction or an exponent
LARGE = 2**18  # bytes of a body that the event loop does not parse itself
PIECE = 2**20  # bytes that one call of a pattern goes over: the interpreter runs no other thread meanwhile

# Possessive, so that they are linear. Both also match nothing.
_BETWEEN = re.compile(rb'[^"\[\]{},]*+')
_IN_STRING = re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL)


async def read_body(request: Request, model: type[Model], limits: Limits) -> Model:
    """Return the body of ``request`` as ``model``. A large one is parsed in a thread, so that streams go on.

    Raises:
        RequestError: 400, see ``parse_body`` and ``validated``.
    """
    raw = await request.body()
    if len(raw) < LARGE:
        return validated(model, parse_body(raw, limits))
    return await asyncio.to_thread(lambda: validated(model, parse_body(raw, limits)))


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
    if b"\\u" in raw:
        _check_surrogates(value)
    return value


def _refused(what: str) -> RequestError:
    return RequestError(400, f"The body {what}.", None, "invalid_json")


def _refuse(what: str) -> NoReturn:
    raise _refused(what)


def _check_shape(raw: bytes, limits: Limits) -> None:
    """Check what would cost the parser its stack or much memory, from the strings and the marks between them alone."""
    at = depth = values = strings = 0
    while at < len(raw) and depth >= 0:  # below 0 the parser stops before it gets further
        at = _BETWEEN.match(raw, at, at + PIECE).end()  # type: ignore[union-attr]
        mark = raw[at : at + 1]
        if mark == b'"':
            at = _end_of_string(raw, at + 1)
            strings += 1
        elif mark in (b"]", b"}"):
            depth -= 1
            at += 1
        elif mark in (b",", b"[", b"{"):
            depth += mark != b","
            values += 1
            at += 1
        # A value is a string at most, and has a key at most.
        if values >= limits.max_json_values or strings > 2 * limits.max_json_values:
            raise _refused(f"has more than {limits.max_json_values} values")
        if depth > limits.max_json_depth:
            raise _refused(f"is nested more than {limits.max_json_depth} deep")


def _end_of_string(raw: bytes, at: int) -> int:
    """Return the place after the quote that ends the string which has begun before ``at``."""
    while at < len(raw):
        at = _IN_STRING.match(raw, at, at + PIECE).end()  # type: ignore[union-attr]
        if raw[at : at + 1] == b'"':
            return at + 1
        if raw[at : at + 1] == b"\\":  # what it escapes is in the next piece
            at += 2
    return at


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
