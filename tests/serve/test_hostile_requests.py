"""Hostile requests to a real server: each is refused in its own words, and at the end nothing of them is held."""

import base64
import json
import re
import socket
import struct
import zlib

import httpx
import pytest
from helpers.serving import messages_of, serving, world

CHAT, RESPONSES, DECISIONS = "/v1/chat/completions", "/v1/responses", "/v1/decisions"
LIMITS = {
    "max_generations": 32,
    "max_tokens": 2000,
    "max_new_tokens": 300,
    "max_seconds": 60,
    "max_n": 4,
    "max_messages": 6,
    "max_text": 2000,
    "max_read_tokens": 400,
    "max_images": 2,
    "max_pixels": 500_000,
    "max_image_bytes": 100_000,
    "max_body_bytes": 500_000,
    "max_body_seconds": 5,
    "max_header_seconds": 5,
}
OPTIONS = [option for name, value in LIMITS.items() for option in ("--limit", f"{name}={value}")]
LEAKS = r"Traceback|\.py\b|site-packages|/usr/|/home/|0x[0-9a-f]{6,}|libjpeg|zlib|PIL\b"
MESSAGES = messages_of(world(3))
GOOD = {"model": "tiny:greedy", "messages": MESSAGES, "seed": 5, "max_completion_tokens": 256}


@pytest.fixture(scope="module")
def hostile():
    """A server with low limits. After all requests nothing may be left of them."""
    with serving(*OPTIONS, "--allow-image-host", "localhost") as served:
        before = answer(served)
        yield served
        assert served.process.poll() is None
        served.assert_nothing_held()
        assert answer(served) == before
        assert not [line for line in served.lines if "Traceback" in line]


def answer(served) -> str:
    reply = httpx.post(served.url + CHAT, json=GOOD, timeout=300)
    assert reply.status_code == 200
    return reply.json()["choices"][0]["message"]


def refused(served, reply: httpx.Response, status: int, words: str) -> None:
    """Check that a reply is an error in OpenAI's shape that says ``words`` and nothing of the server's insides."""
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert words in error["message"]
    assert len(error["message"]) < 1100
    assert not re.search(LEAKS, reply.text)


def post(served, body: object, path: str = CHAT) -> httpx.Response:
    return httpx.post(served.url + path, json=body, timeout=300)


def said(text: str, role: str = "user") -> dict:
    return {"role": role, "content": text}


def image(url: str) -> dict:
    return {"type": "image_url", "image_url": {"url": url}}


def asked(*urls: str) -> list[dict]:
    return [{"role": "user", "content": [*map(image, urls), {"type": "text", "text": "How many?"}]}]


def own(**fields: object) -> dict:
    return {"llava_cot": fields}


SWIRES, RAW = {"model": "tiny:swires"}, {"model": "tiny", "llava_cot": {"output": "raw"}}
CONTINUED = {"messages": [*MESSAGES, said("<SUMMARY>", "assistant")], "continue_final_message": True}

# Changes of a good chat request -> what is said of it
CHANGES = [
    # Wrong types. Nothing is taken for a number or a truth value that is none.
    ({"model": None}, "model is wrong"),
    ({"model": 7}, "model is wrong"),
    ({"messages": None}, "messages is wrong"),
    ({"messages": "hello"}, "messages is wrong"),
    ({"messages": {}}, "messages is wrong"),
    ({"messages": [1] * 1000}, "messages[0] is wrong"),
    ({"messages": [[]]}, "messages[0] is wrong"),
    ({"messages": [{}]}, "messages[0]"),
    ({"seed": "7"}, "seed is wrong"),
    ({"seed": 7.0}, "seed is wrong"),
    ({"seed": True}, "seed is wrong"),
    ({"n": "2"}, "n is wrong"),
    ({"n": None}, "n is wrong"),
    ({"stream": "true"}, "stream is wrong"),
    ({"stream": 1}, "stream is wrong"),
    ({"temperature": "0.5"}, "temperature is wrong"),
    ({"temperature": [1]}, "temperature is wrong"),
    ({"max_completion_tokens": 1.5}, "max_completion_tokens is wrong"),
    ({"max_completion_tokens": "all"}, "max_completion_tokens is wrong"),
    ({"stop": 7}, "stop"),
    ({"stop": [None]}, "stop"),
    ({"logprobs": 5}, "logprobs is wrong"),
    ({"user": {"a": 1}}, "user is wrong"),
    ({"llava_cot": []}, "llava_cot is wrong"),
    ({"llava_cot": "x"}, "llava_cot is wrong"),
    (own(settings=[]), "llava_cot.settings is wrong"),
    (own(budget=7), "llava_cot.budget is wrong"),
    (own(budget={"seconds": "9"}), "llava_cot.budget"),
    (own(budget={"seconds": None}), "llava_cot.budget"),
    (own(trace="everything"), "llava_cot.trace is wrong"),
    (own(output="raw text"), "llava_cot.output is wrong"),
    (own(seeds="1"), "llava_cot.seeds is wrong"),
    # Unknown keys, at every level
    ({"surprise": 1}, "surprise is not a field that this server knows"),
    ({"__proto__": {"admin": True}}, "__proto__ is not a field that this server knows"),
    ({"tools": []}, "tools is not a field that this server knows"),
    ({"response_format": {"type": "json_object"}}, "response_format is not a field"),
    ({"guided_regex": "(a+)+$"}, "guided_regex is not a field"),
    ({"mm_processor_kwargs": {"size": 10**9}}, "mm_processor_kwargs is not a field"),
    ({"chat_template": "{{ ''.__class__ }}"}, "chat_template is not a field"),
    ({"messages": [{**said("a"), "tool_calls": []}]}, "messages[0].tool_calls is not a field"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "x": 1}]}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{**image("data:,"), "uuid": "1"}]}]}, "uuid is not a field"),
    ({"messages": [{"role": "user", "content": [{"type": "input_audio", "data": "a"}]}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "video_url", "url": "a"}]}]}, "messages[0].content"),
    ({"stream_options": {"x": 1}}, "stream_options.x is not a field"),
    (own(x=1), "llava_cot.x is not a field"),
    (own(budget={"x": 1}), "llava_cot.budget must have keys of"),
    ({**SWIRES, **own(settings={"x": 1})}, "x is not supported"),
    ({"k" * 10_000: 1}, "is not a field that this server knows"),
    # Models and searches
    ({"model": ""}, "model must be one that /v1/models lists"),
    ({"model": "../../etc/passwd"}, "model must be one that /v1/models lists"),
    ({"model": "tiny:swires:evil"}, "model must be one that /v1/models lists"),
    ({"model": "tiny\r\nX-Injected: 1"}, "model must be one that /v1/models lists"),
    ({"model": "m" * 100_000}, "model must be one that /v1/models lists"),
    (own(search="os.system"), "llava_cot.search must"),
    ({"model": "tiny", **own(search="s" * 100_000)}, "llava_cot.search must be one of"),
    (own(scorer="reward:/etc"), "llava_cot.scorer must be one of"),
    ({"model": "tiny", **own(search="swires", scorer="__import__")}, "llava_cot.scorer must be one of"),
    # Contradictions
    ({"max_tokens": 5}, "max_tokens and max_completion_tokens must not both be given"),
    ({"reasoning_effort": "high"}, "reasoning_effort must not be given where"),
    (own(search="best_of_n"), "llava_cot.search must not be another"),
    ({"model": "tiny", "reasoning_effort": "low", **own(search="swires")}, "reasoning_effort must not be given where"),
    ({**SWIRES, **own(settings={"cutoff": 1, "cutoff_z": 1})}, "cutoff and cutoff_z must not both be given"),
    ({**SWIRES, **own(settings={"retrace": {"SUMMARY": "CONCLUSION"}})}, "retrace['SUMMARY'] must be that stage or"),
    ({**SWIRES, **own(settings={"budget": {"seconds": 10**9}})}, "llava_cot.settings must not have 'budget'"),
    ({**SWIRES, **own(settings={"grammar": "a"})}, "llava_cot.settings must not have 'grammar'"),
    ({**SWIRES, **own(settings={"scorer": "a"})}, "llava_cot.settings must not have 'scorer'"),
    ({**SWIRES, **own(settings={"max_new_tokens": 10**9})}, "llava_cot.settings must not have 'max_new_tokens'"),
    ({"temperature": 0.7}, "temperature"),
    ({"continue_final_message": True}, "continue_final_message must not be given without"),
    (own(seeds=[1]), "llava_cot.seeds must not be given without"),
    (own(prefix_token_ids=[1]), "llava_cot.prefix_token_ids must not be given without"),
    # Numbers out of their range
    ({"seed": -1}, "seed must be in [0, 2**63 - n), got -1"),
    ({"seed": 2**63 - 1}, "seed must be in [0, 2**63 - n)"),
    ({"seed": -(10**18)}, "seed must be in"),
    ({"seed": 10**30}, "The body has an integer of more than 19 digits"),
    ({"n": 0}, "n must be from 1 to 4, got 0"),
    ({"n": -1}, "n must be from 1 to 4"),
    ({"n": 10**9}, "n must be from 1 to 4"),
    ({"max_completion_tokens": 0}, "max_completion_tokens must be from 1 to 300, got 0"),
    ({"max_completion_tokens": -5}, "max_completion_tokens must be from 1 to 300"),
    ({"max_completion_tokens": 10**18}, "max_completion_tokens must be from 1 to 300"),
    ({"model": "tiny:sample", "temperature": -0.1}, "temperature must be >= 0"),
    ({"model": "tiny:sample", "temperature": 1e308}, "temperature must be finite in float32"),
    ({"model": "tiny:sample", "top_p": 0}, "top_p must be in (0, 1]"),
    ({"model": "tiny:sample", "top_p": 1e-300}, "top_p must be at least"),
    ({"model": "tiny:sample", "top_p": 1.1}, "top_p must be in (0, 1]"),
    ({"model": "tiny:sample", "top_k": -1}, "top_k must be >= 0"),
    ({"model": "tiny:sample", "top_k": 9_223_372_036_854_775_808}, "top_k must be < 2**63"),
    ({"model": "tiny:sample", "min_p": 2}, "min_p must be in [0, 1]"),
    ({"model": "tiny:token_beam", **own(settings={"length_penalty": 1e308})}, "length_penalty must be in [-50, 50]"),
    (
        {"model": "tiny:token_beam", **own(settings={"length_penalty": 2**63 - 1})},
        "length_penalty must be in [-50, 50]",
    ),
    ({"frequency_penalty": 1}, "frequency_penalty is wrong"),
    ({"logprobs": True, "top_logprobs": 20}, "top_logprobs is wrong"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a", ""]}, "stop[1] is wrong"),
    ({"stop": ["a"] * 5}, "stop must have from 0 to 4 entries, got 5"),
    ({"stop": "a" * 257}, "stop"),
    # More than the caps
    ({**SWIRES, **own(settings={"candidates": 10**18})}, "must ask for from 1 to 32 candidates x rounds x n"),
    ({**SWIRES, **own(settings={"max_rounds": 10**18})}, "max_rounds must be from 1 to 32"),
    ({**SWIRES, **own(settings={"keep": 10**9})}, "must ask for from 1 to 32 candidates x rounds x n"),
    ({**SWIRES, "n": 4}, "must ask for from 1 to 32 candidates x rounds x n"),
    (
        {"model": "tiny:best_of_n", **own(settings={"n": 33})},
        "must ask for from 1 to 32 candidates x rounds x n, got 33",
    ),
    ({"model": "tiny:best_of_n", "n": 4, **own(settings={"n": 9})}, "candidates x rounds x n, got 36"),
    ({"model": "tiny:sentence_beam", **own(settings={"candidates": 10**6})}, "candidates x rounds x n, got 1000000"),
    ({"model": "tiny:token_beam", **own(settings={"num_beams": 10**6})}, "candidates x rounds x n, got 1000000"),
    ({"model": "tiny", "reasoning_effort": "high"}, "must ask for from 1 to 32 candidates x rounds x n"),
    (own(budget={"generated_tokens": 2001}), "llava_cot.budget.generated_tokens must be at most 2000, got 2001"),
    ({"n": 2, **own(budget={"generated_tokens": 1001})}, "llava_cot.budget.generated_tokens must be at most 1000"),
    (own(budget={"seconds": 61}), "llava_cot.budget.seconds must be at most 60"),
    (own(budget={"generations": 100}), "llava_cot.budget.generations must be at most 33"),
    (own(budget={"seconds": 0}), "llava_cot.budget.seconds must be > 0"),
    (own(budget={"seconds": -1}), "llava_cot.budget.seconds must be > 0"),
    (own(budget={"generated_tokens": 1.5}), "llava_cot.budget.generated_tokens must be int"),
    (own(budget={"reserve": 1}), "llava_cot.budget.reserve must be in [0, 1)"),
    # Conversations
    ({"messages": []}, "messages must be from 1 to 6, got 0"),
    ({"messages": [said("a")] * 7}, "messages must be from 1 to 6, got 7"),
    ({"messages": [said("a" * 2001)]}, "the text of messages must be from 1 to 2000, got 2001"),
    ({"messages": [said("red " * 400)]}, "n=1 answers, must have at most 400 tokens of text, got"),
    ({"messages": [said("red " * 100)], "n": 4}, "n=4 answers, must have at most 400 tokens of text, got"),
    ({"messages": [said("<|eot_id|>" * 150)]}, "n=1 answers, must have at most 400 tokens of text, got"),
    ({**RAW, "messages": [said("red " * 400)]}, "must have at most 400 tokens of text, got"),
    ({"messages": [said("")]}, "messages"),
    ({"messages": [{"role": "user", "content": []}]}, "messages"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
    ({"messages": [said("a", "root")]}, "messages[0].role is wrong"),
    ({"messages": [said("a", "tool")]}, "messages[0].role is wrong"),
    ({"messages": [said("a", "assistant")]}, "messages"),
    ({"messages": [said("a"), said("b", "system"), said("c")]}, "messages"),
    ({"messages": [{"role": "assistant", "content": [image("data:,")]}, said("a")]}, "images of the user alone"),
    # Raw continuations
    ({**RAW, "stream": True}, "stream must be false"),
    ({**RAW, "stop": ["x"]}, "stop must be among"),
    ({**RAW, **own(output="raw", seeds=[])}, "llava_cot.seeds must have from 1 to 32 entries, got 0"),
    ({**RAW, **own(output="raw", seeds=[1] * 33)}, "llava_cot.seeds must have from 1 to 32 entries, got 33"),
    ({**RAW, **own(output="raw", seeds=[-1])}, "llava_cot.seeds must be in [0, 2**63), got -1"),
    ({**RAW, **own(output="raw", prefix_token_ids=[1])}, "prefix_token_ids must not be given without"),
    ({**CONTINUED, **own(output="raw", prefix_token_ids=[-1])}, "prefix_token_ids must be in [0, 640), got -1"),
    ({**CONTINUED, **own(output="raw", prefix_token_ids=[640])}, "prefix_token_ids must be in [0, 640), got 640"),
    ({**CONTINUED, **own(output="raw", prefix_token_ids=[1] * 301)}, "prefix_token_ids must have from 0 to 300"),
    ({**CONTINUED, **own(output="raw", search="swires")}, "llava_cot must not have a search"),
    (
        {"messages": [*MESSAGES, said("<|image|>", "assistant")], "continue_final_message": True, **own(output="raw")},
        "tokens must be in [0, vocab_size=640), got 640",
    ),
]


@pytest.mark.parametrize("change, words", CHANGES, ids=[f"{at}-{words[:40]}" for at, (_, words) in enumerate(CHANGES)])
def test_a_chat_request_is_refused_before_anything_is_queued(hostile, change, words):
    found = post(hostile, {**GOOD, **change})
    refused(hostile, found, 404 if found.status_code == 404 and "lists" in words else 400, words)


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, data: bytes = b"") -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def uri(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


NOT_ALLOWED, NOT_PLAIN = "is not one that this server may download from", "must be a plain https URL with a host name"
NO_URI, BROKEN = "An image must be a base64 data URI or an https URL.", "its file is broken or incomplete"
WEBP = b"RIFF\x16\0\0\0WEBPVP8X\x0a\0\0\0" + bytes(4) + b"\xff" * 6
IMAGES = [
    # SSRF. "localhost" is on the list of hosts, and its address is still refused.
    ("https://localhost/a.png", 400, "The image could not be downloaded."),
    ("https://LOCALHOST/a.png", 400, "The image could not be downloaded."),
    ("https://localhost:8000/a.png", 400, NOT_ALLOWED),
    ("https://localhost.evil.test/", 400, NOT_ALLOWED),
    ("https://metadata.google.internal/", 400, NOT_ALLOWED),
    ("https://localtest.me/", 400, NOT_ALLOWED),
    ("https://169.254.169.254/latest/meta-data/", 400, NOT_PLAIN),
    ("https://127.0.0.1/", 400, NOT_PLAIN),
    ("https://127.1/", 400, NOT_PLAIN),
    ("https://2130706433/", 400, NOT_PLAIN),
    ("https://0x7f000001/", 400, NOT_PLAIN),
    ("https://0177.0.0.1/", 400, NOT_PLAIN),
    ("https://[::1]/", 400, NOT_PLAIN),
    ("https://[::ffff:169.254.169.254]/", 400, NOT_PLAIN),
    ("https://[fe80::1%25lo]/", 400, NOT_PLAIN),
    ("https://localhost@evil.test/", 400, NOT_PLAIN),
    ("https://evil.test\\@localhost/", 400, NOT_PLAIN),
    ("https://localhost\\@evil.test/", 400, NOT_PLAIN),
    ("https://localhost#@evil.test/", 400, NOT_PLAIN),
    ("https://localhost%2f@evil.test/", 400, NOT_PLAIN),
    ("https://localhost./", 400, NOT_PLAIN),
    ("https://local\thost/", 400, NOT_PLAIN),
    ("https://localhost/\r\nX-Injected: 1", 400, NOT_PLAIN),
    ("https://\uff4cocalhost/", 400, NOT_PLAIN),
    ("https://localhost:0/", 400, NOT_PLAIN),
    ("https:localhost/", 400, NO_URI),
    ("http://localhost/a.png", 400, NO_URI),
    ("file:///etc/passwd", 400, NO_URI),
    ("/etc/passwd", 400, NO_URI),
    ("gopher://127.0.0.1:6379/_FLUSHALL", 400, NO_URI),
    ("ftp://localhost/", 400, NO_URI),
    ("//localhost/a.png", 400, NO_URI),
    ("", 400, NO_URI),
    # Data that is no image, or is one too many
    ("data:,hello", 400, "must be data:TYPE;base64,DATA"),
    ("data:image/png;base64,", 400, "must be data:TYPE;base64,DATA"),
    ("data:image/png;base64,!!!!", 400, "base64 data is wrong"),
    (uri(b"<svg onload='alert(1)'/>"), 400, "must be a JPEG, PNG, WebP or GIF file"),
    (uri(b"%PDF-1.7"), 400, "must be a JPEG, PNG, WebP or GIF file"),
    (uri(b"\x80\x04cos\nsystem\n"), 400, "must be a JPEG, PNG, WebP or GIF file"),
    (uri(b"SIMPLE  = T"), 400, "must be a JPEG, PNG, WebP or GIF file"),
    (uri(png(1, 1, b"\0\0")), 400, "must have at least 8 pixels"),
    (uri(png(7, 500, bytes(4000))), 400, "must have at least 8 pixels"),
    (uri(png(8, 1000, bytes(9000))), 400, "at most 100 times its short side"),
    (uri(png(50_000, 50_000)), 413, "may have at most 500000 pixels in all"),
    (uri(png(2**31 - 1, 2**31 - 1)), 413, "may have at most 500000 pixels in all"),
    (
        uri(b"GIF89a\xff\xff\xff\xff\0\0\0" + b",\0\0\0\0\xff\xff\xff\xff\0\x02\x02\x44\x01\0;"),
        413,
        "500000 pixels in all",
    ),
    (uri(WEBP), 413, "may have at most 500000 pixels in all"),
    (uri(png(700, 700, bytes(100))), 400, BROKEN),
    (uri(png(100, 100, bytes(10_100))[:-30]), 400, BROKEN),
    (uri(png(100, 100, bytes(10_100)).replace(b"IDAT", b"IDAX")), 400, BROKEN),
    (uri(b"\xff\xd8\xff\xe0" + bytes(100)), 400, BROKEN),
    (uri(b"\xff\xd8" + b"\xff\xda\0\x04\0\0" * 101), 400, "at most 100 scans"),
    (uri(png(100, 100, bytes(10_100))[:-12] + chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**21)))), 400, BROKEN),
    (uri(bytes(100_001)), 413, "may have at most 100000 bytes"),
]


@pytest.mark.parametrize("path", [CHAT, RESPONSES])
@pytest.mark.parametrize("url, status, words", IMAGES, ids=[f"{at}-{case[2][:40]}" for at, case in enumerate(IMAGES)])
def test_an_image_is_refused_and_its_field_is_named(hostile, path, url, status, words):
    if path == CHAT:
        found = post(hostile, {**GOOD, "messages": asked(url)})
    else:
        content = [{"type": "input_image", "image_url": url}, {"type": "input_text", "text": "How many?"}]
        items = [{"type": "reasoning"}, {"role": "user", "content": content}]
        found = post(hostile, {"model": "tiny:greedy", "instructions": "Be brief.", "input": items}, path)
    refused(hostile, found, status, words)
    param = "messages[0].content[0].image_url.url" if path == CHAT else "input[1].content[0].image_url"
    assert found.json()["error"]["param"] == param


def test_good_images_do_not_hide_a_bad_one(hostile):
    good = MESSAGES[0]["content"][0]["image_url"]["url"]
    refused(hostile, post(hostile, {**GOOD, "messages": asked(good, uri(png(100, 100)))}), 400, BROKEN)
    refused(hostile, post(hostile, {**GOOD, "messages": asked(good, good, good)}), 400, "the images of messages")
    large = uri(png(600, 600, bytes(601 * 600)))
    refused(hostile, post(hostile, {**GOOD, "messages": asked(large, large)}), 413, "500000 pixels in all")


BODIES = [
    (b"", "is not valid JSON"),
    (b"null", "must be a JSON object"),
    (b"[]", "must be a JSON object"),
    (b"{", "is not valid JSON"),
    (b"model=tiny&messages=hello", "is not valid JSON"),
    (b"[" * 100_000, "is nested more than 16 deep"),
    (b"[" + b'""' * 200_000, "has more than 50000 values"),
    (b'{"a":' * 1000, "is nested more than 16 deep"),
    (b'{"model": "tiny", "metadata": ' + b"[" * 20 + b"]" * 20 + b"}", "is nested more than 16 deep"),
    (b'{"metadata": [' + b"0," * 60_000 + b"0]}", "has more than 50000 values"),
    (b'{"seed": NaN}', "has NaN"),
    (b'{"temperature": Infinity}', "has Infinity"),
    (b'{"temperature": 1e400}', "has a number that is too large"),
    (b'{"seed": ' + b"9" * 100_000 + b"}", "has an integer of more than 19 digits"),
    (b'{"model": "tiny", "model": "other"}', 'has the key "model" twice'),
    (b'{"model": "\xff\xfe"}', "is not UTF-8"),
    (b'{"model": "\xed\xa0\x80"}', "is not UTF-8"),
    (b'{"model": "\\ud800"}', "has half of a surrogate pair"),
    ('{"model": "tiny"}'.encode("utf-16"), "is not UTF-8"),
    (b'\xef\xbb\xbf{"model": "tiny"}', "is not valid JSON"),
]


@pytest.mark.parametrize("path", [CHAT, RESPONSES, DECISIONS])
@pytest.mark.parametrize("body, words", BODIES, ids=[f"{at}-{words[:30]}" for at, (_, words) in enumerate(BODIES)])
def test_a_body_that_is_no_clear_json_is_refused(hostile, path, body, words):
    found = httpx.post(hostile.url + path, content=body, headers={"Content-Type": "application/json"}, timeout=300)
    refused(hostile, found, 400, words)


YES = {"type": "predicate", "instructions": "Is it red?"}


@pytest.mark.parametrize(
    "path, body, words",
    [
        (RESPONSES, {"input": "a", "messages": []}, "messages is not a field"),
        (RESPONSES, {"input": 7}, "input"),
        (RESPONSES, {"input": []}, "input must be from 1 to 6, got 0"),
        (RESPONSES, {"input": "a", "reasoning": {"effort": "extreme"}}, "reasoning.effort is wrong"),
        (RESPONSES, {"input": "a", "max_output_tokens": 301}, "max_output_tokens must be from 1 to 300"),
        (RESPONSES, {"input": "a", "llava_cot": {"output": "raw"}}, "llava_cot.output must be 'conclusion'"),
        (RESPONSES, {"input": "a", "previous_response_id": "resp_1"}, "previous_response_id is not a field"),
        (RESPONSES, {"input": "a", "store": True}, "store is wrong"),
        (RESPONSES, {"input": "a" * 2001}, "the text of input"),
        (RESPONSES, {"input": "a\ufdd0", "instructions": "b"}, "the text of input must be Unicode text"),
        (RESPONSES, {"input": "a", "instructions": "a" * 2000}, "the text of input"),
        (RESPONSES, {"input": [said("a", "assistant")]}, "input"),
        (DECISIONS, {"input": [said("a", "assistant")], "questions": [YES]}, "input"),
        (DECISIONS, {"input": "a" * 2001, "questions": [YES]}, "the text of input"),
        (DECISIONS, {"input": "a"}, "questions must be given"),
        (DECISIONS, {"input": "a", "questions": []}, "questions"),
        (DECISIONS, {"input": "a", "questions": [YES] * 65}, "questions must have from 1 to 64 entries"),
        (DECISIONS, {"input": "a", "questions": [{**YES, "type": "essay"}]}, "questions[0]"),
        (DECISIONS, {"input": "a", "questions": [{**YES, "x": 1}]}, "x is not a field"),
        (DECISIONS, {"input": "a", "questions": [{**YES, "instructions": "a" * 2001}]}, "the text of questions"),
        (DECISIONS, {"input": "a", "questions": [YES] * 40}, "input and 40 questions must have at most 400 tokens"),
        (RESPONSES, {"input": "red " * 400}, "input, read for n=1 answers, must have at most 400 tokens"),
        (DECISIONS, {"input": "a", "questions": [{**YES, "type": "choice", "choices": [{"value": "a"}]}]}, "choices"),
        (DECISIONS, {"input": "a", "questions": [YES], "model": "other"}, "model must be one that"),
    ],
)
def test_the_other_apis_refuse_too(hostile, path, body, words):
    found = post(hostile, {"model": "tiny", **body}, path)
    refused(hostile, found, 404 if "model must" in words else 400, words)
    assert "messages" not in found.text or "messages" in body  # the client has sent none


@pytest.mark.parametrize(
    "method, path, status",
    [
        *(
            ("GET", CHAT, 405),
            ("PUT", CHAT, 405),
            ("DELETE", CHAT, 405),
            ("PATCH", RESPONSES, 405),
            ("TRACE", CHAT, 405),
        ),
        *(
            ("POST", "/health", 405),
            ("POST", "/v1/models", 405),
            ("DELETE", "/v1/models/tiny", 405),
            ("POST", "/metrics", 405),
        ),
        *(("GET", "/v1", 404), ("GET", "/docs", 404), ("GET", "/openapi.json", 404), ("GET", "/redoc", 404)),
        *(("POST", "/v1/completions", 404), ("POST", "/v1/embeddings", 404), ("POST", "/invocations", 404)),
        *(("GET", "/.env", 404), ("GET", "/.git/config", 404), ("GET", "/v1/models/../../etc/passwd", 404)),
        *(("GET", "/v1/models/" + "a" * 5000, 404), ("GET", "/v1/models/%00", 404), ("GET", "/v1/models/%ff", 404)),
        *(("GET", "/page/../app.py", 404), ("GET", "/page/%2e%2e/app.py", 404), ("GET", "/page/..%2fapp.py", 404)),
        *(("GET", "/page/..%5capp.py", 404), ("GET", "/page/....//app.py", 404), ("GET", "/page//etc/passwd", 404)),
        *(
            ("GET", "/page/%00", 404),
            ("GET", "/page/__init__.py", 404),
            ("GET", "/page/routes.py", 404),
            ("GET", "/page/", 404),
        ),
    ],
)
def test_unknown_routes_and_methods_are_refused(hostile, method, path, status):
    headers = {"Content-Type": "application/json"}
    reply = exchange(hostile, f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items()))
    assert reply[0] == status
    assert "error" in json.loads(reply[1])
    assert not re.search(r"Traceback|site-packages|root:", reply[1])


def exchange(served, first: str, *headers: str, body: bytes = b"", host: str = "localhost") -> tuple[int, str]:
    """Send a request as it is, without a client that would mend it: the status and the body of the reply."""
    lines = [first, f"Host: {host}", "Connection: close", *headers]
    if not any(header.startswith("Content-Length") for header in headers):
        lines.append(f"Content-Length: {len(body)}")
    request = "\r\n".join([*lines, "", ""]).encode("latin-1") + body
    with socket.create_connection(address(served), timeout=300) as connection:
        connection.sendall(request)
        reply = b""
        while data := connection.recv(2**16):
            reply += data
    head, _, text = reply.partition(b"\r\n\r\n")
    return int(head.split()[1]), text.decode()


def address(served) -> tuple[str, int]:
    host, port = served.url.removeprefix("http://").split(":")
    return host, int(port)


POST, JSON = f"POST {CHAT} HTTP/1.1", "Content-Type: application/json"


@pytest.mark.parametrize(
    "first, headers, host, status",
    [
        (POST, (JSON,), "evil.test", 403),  # a name that an attacker resolves to this machine
        (POST, (JSON,), "127.0.0.1.evil.test", 403),
        ("GET / HTTP/1.1", (), "evil.test", 403),
        ("GET /metrics HTTP/1.1", (), "169.254.169.254", 403),
        (POST, ("Content-Type: text/plain",), "localhost", 415),  # what a foreign page may send unasked
        (POST, ("Content-Type: application/x-www-form-urlencoded",), "localhost", 415),
        (POST, ("Content-Type: multipart/form-data; boundary=a",), "localhost", 415),
        (POST, (), "localhost", 415),
        (POST, (JSON, "Content-Encoding: gzip"), "localhost", 415),
        (POST, (JSON, "Content-Length: 500001"), "localhost", 413),
        (POST, (JSON, "Content-Length: 99999999999999999"), "localhost", 413),
        (POST, (JSON, "Content-Length: -1"), "localhost", 400),
        (POST, (JSON, "Content-Length: 1", "Content-Length: 2"), "localhost", 400),
        (POST, (JSON, "X: a\rSet-Cookie: b"), "localhost", 400),
        (POST, (JSON, "X: a\0b"), "localhost", 400),
        (POST, (JSON, "Bad Name: a"), "localhost", 400),
        (POST, (JSON, f"X: {'a' * 20_000}"), "localhost", 431),
        (POST, (JSON, *(f"X-{number}: a" for number in range(150))), "localhost", 431),
        ("GET /\r\n HTTP/1.1", (), "localhost", 400),
        ("GET  / HTTP/1.1", (), "localhost", 400),
        ("GET / HTTP/x", (), "localhost", 400),
        ("\x16\x03\x01\x02", (), "localhost", 400),  # the start of a TLS handshake
    ],
)
def test_requests_of_no_honest_client_are_refused(hostile, first, headers, host, status):
    assert exchange(hostile, first, *headers, host=host)[0] == status


def test_large_bodies_are_refused(hostile):
    body = b'{"model": "' + b"a" * 600_000 + b'"}'
    assert exchange(hostile, POST, JSON, body=body)[0] == 413
    refused(
        hostile,
        httpx.post(hostile.url + CHAT, content=iter([body]), headers={"Content-Type": "application/json"}),
        413,
        "500000",
    )


def test_slow_clients_are_given_up(hostile):
    starts = (b"", b"G", b"GET / HTTP/1.1\r\nX: a\r\nX-Slow: ", f"{POST}\r\nHost: localhost\r\n{JSON}\r\n".encode())
    body = f"{POST}\r\nHost: localhost\r\n{JSON}\r\nContent-Length: 100\r\n\r\n{{".encode()
    connections = [socket.create_connection(address(hostile), timeout=300) for _ in (*starts, body)]
    for connection, start in zip(connections, (*starts, body)):
        connection.sendall(start)
    for connection in connections:
        with connection:
            assert connection.recv(2**16).startswith(b"HTTP/1.1 408 ")
            while connection.recv(2**16):
                pass


def test_clients_that_go_at_any_moment_leave_nothing(hostile):
    body = json.dumps({**GOOD, **SWIRES, "stream": True, "max_completion_tokens": 300}).encode()
    head = f"{POST}\r\nHost: localhost\r\n{JSON}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    for sent in (b"P", head[:40], head, head + body[:100], head + body):
        with socket.create_connection(address(hostile), timeout=300) as connection:
            connection.sendall(sent)
            if sent.endswith(body):
                connection.recv(100)  # it has begun
    hostile.assert_nothing_held()


def test_what_the_model_may_read_is_no_reason_to_fail(hostile):
    """Marks of the chat template and odd characters are text, and budgets of almost nothing are budgets."""
    short = {**GOOD, "max_completion_tokens": 20}
    for text in ("<|image|><|eot_id|><|begin_of_text|>", "\0\ufffe\u202e\U0001f600", "</CONCLUSION>" * 50):
        assert post(hostile, {**short, "messages": [said(text)]}).status_code == 200
    for budget in ({"generated_tokens": 1}, {"seconds": 1e-9}, {"prompt_tokens": 1}):
        assert post(hostile, {**short, **SWIRES, **own(budget=budget)}).status_code == 200
    for change in ({"temperature": 5e-324}, {"top_k": 2**63 - 1}, {"top_p": 1e-30}, {"seed": 2**63 - 2}):
        assert post(hostile, {**short, "model": "tiny:sample", **change}).status_code == 200
