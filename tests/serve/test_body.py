"""The JSON of a request: what is refused, with which words, and that nothing of it costs much."""

import asyncio
import json

import pytest
from starlette.requests import Request

from llava_cot.serve import body
from llava_cot.serve.body import LARGE, parse_body, read_body
from llava_cot.serve.errors import RequestError
from llava_cot.serve.limits import Limits
from llava_cot.serve.schema import TextPart

LIMITS = Limits(max_json_depth=4, max_json_values=50)


def refusal(raw: bytes) -> str:
    with pytest.raises(RequestError) as caught:
        parse_body(raw, LIMITS)
    error = caught.value
    assert (error.status, error.code, error.param) == (400, "invalid_json", None)
    assert error.body["error"]["type"] == "invalid_request_error"
    return error.message


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"a": [1, -2.5, 1e3, True, None, 'ä\\ " [{[{[{[{', {"b": {"c": "😀"}}], "[": "{"},
        {"seed": 2**63 - 1, "low": -(2**63), "numbers": list(range(40))},
        {"text": "\\" * 1000 + '"' * 1000},
    ],
)
@pytest.mark.parametrize("ascii_only", [True, False])
def test_json_is_read_as_python_reads_it(value, ascii_only):
    assert parse_body(json.dumps(value, ensure_ascii=ascii_only).encode(), LIMITS) == value


@pytest.mark.parametrize(
    "raw, words",
    [
        (b"", "is not valid JSON: see position 0"),
        (b"{", "is not valid JSON: see position 1"),
        (b'{"a": 1,}', "is not valid JSON"),
        (b"{'a': 1}", "is not valid JSON: see position 1"),
        (b'{"a": 1} {}', "is not valid JSON: see position 9"),
        (b'{"a": 01}', "is not valid JSON"),
        (b'{"a": "\n"}', "is not valid JSON: see position 7"),
        (b'{"a": "\\x"}', "is not valid JSON"),
        (b'{"a": "', "is not valid JSON"),
        (b"]]]]", "is not valid JSON: see position 0"),
        (b"\xef\xbb\xbf{}", "is not valid JSON"),
        (b"a=1&b=2", "is not valid JSON: see position 0"),
        (b"[]", "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b'"text"', "must be a JSON object"),
        (b'{"a": "\xff"}', "is not UTF-8"),
        (b'{"a": "\xc0\xaf"}', "is not UTF-8"),
        (b'{"a": "\xed\xa0\x80"}', "is not UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "is not UTF-8"),
        ('{"a": 1}'.encode("utf-16-le"), "is not valid JSON"),
        (b'{"a": "\\ud800"}', "has half of a surrogate pair"),
        (b'{"a": [{"\\udc00\\ud800": 1}]}', "has half of a surrogate pair"),
        (b'{"a": 1, "b": {"c": 1, "d": 2, "c": 1}}', 'has the key "c" twice in one object'),
        (b'{"a": 1, "\\u0061": 2}', 'has the key "a" twice in one object'),
        (b'{"a": NaN}', "has NaN, which is no JSON number"),
        (b'{"a": [Infinity]}', "has Infinity, which is no JSON number"),
        (b'{"a": -Infinity}', "has -Infinity, which is no JSON number"),
        (b'{"a": 1e999}', "has a number that is too large or has more than 40 characters"),
        (b'{"a": 0.' + b"1" * 10**6 + b"}", "has a number that is too large or has more than 40 characters"),
        (b'{"a": ' + b"9" * 20 + b"}", "has an integer of more than 19 digits"),
        (b'{"a": -' + b"9" * 10**6 + b"}", "has an integer of more than 19 digits"),
        (b'{"a": [[[[1]]]]}', "is nested more than 4 deep"),
        (b'{"a": ' + b'{"a": ' * 10 + b"1" + b"}" * 11, "is nested more than 4 deep"),
        (b"[" * 49, "is nested more than 4 deep"),
        (b"[" * 10**6, "is nested more than 4 deep"),
        (b"[1," * 10 + b"]," * 10**6, "is nested more than 4 deep"),
        (b'{"a": [' + b"[]," * 60 + b"[]]}", "has more than 50 values"),
        (b'{"a": [' + b"1," * 60 + b"1]}", "has more than 50 values"),
        (b'{"a": ' + b'""' * 10**6 + b"}", "has more than 50 values"),
        (b'{"a": "\\"' + b'\\\\" [[[[[[', "is nested more than 4 deep"),  # the string ends before the brackets
        (b'{"a": "' + b"\\" * 10**6, "is not valid JSON"),
    ],
    ids=lambda case: case[:40] if isinstance(case, str) else "",
)
def test_what_is_refused(raw, words):
    assert words in refusal(raw)


@pytest.mark.parametrize("piece", [1, 2, 3, 7])
def test_a_body_is_gone_over_in_pieces(monkeypatch, piece):
    monkeypatch.setattr(body, "PIECE", piece)
    for value in ({}, {"a": [1, 'ä\\ " \\" [{[{[{[{', {"b": {"c": "\\\\" * 9 + '"'}}], "]": "{"}):
        for ascii_only in (True, False):
            assert parse_body(json.dumps(value, ensure_ascii=ascii_only).encode(), LIMITS) == value
    assert "is nested more than 4 deep" in refusal(b'{"a": "\\"' + b'\\\\" [[[[[[')
    assert "is not valid JSON" in refusal(b'{"a": "' + b"\\" * 9)


def test_streams_go_on_while_a_large_body_is_parsed():
    text = "x" * LARGE

    async def count(raw: bytes) -> int:
        """How many times other tasks run meanwhile."""

        async def receive() -> dict:
            return {"type": "http.request", "body": raw}

        async def tick() -> None:
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0)

        ticks, task = 0, asyncio.create_task(tick())
        request = Request({"type": "http", "headers": []}, receive)
        asked = await read_body(request, TextPart, LIMITS)
        task.cancel()
        assert asked.type == "text"
        return ticks

    assert asyncio.run(count(b'{"type": "text", "text": "a"}')) == 0
    assert asyncio.run(count(b'{"type": "text", "text": "' + text.encode() + b'"}')) > 0


def test_a_key_that_stands_twice_is_quoted_in_part():
    key = b'"' + b"k" * 1000 + b'"'
    assert len(refusal(b"{" + key + b": 1, " + key + b": 2}")) < 200


def test_two_megabytes_are_one_pass():
    """Each of these takes a quadratic reader, or one that backtracks, more than a lifetime."""
    quotes = b'{"a": "' + b'\\"' * (2**20) + b'"}'
    assert parse_body(quotes, LIMITS) == {"a": '"' * (2**20)}
    assert "has more than 50 values" in refusal(b'{"a": ' + b'"' * (2 * 2**20))
    assert "is not valid JSON" in refusal(b'{"a": ' + b"]" * (2 * 2**20))
