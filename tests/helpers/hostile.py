"""Requests that no server takes, whatever its limits, and what each is told."""

import base64
import re
import struct
import zlib

import httpx

from helpers.serving import messages_of, world

CHAT, RESPONSES, DECISIONS = "/v1/chat/completions", "/v1/responses", "/v1/decisions"
LEAKS = r"Traceback|\.py\b|site-packages|/usr/|/home/|0x[0-9a-f]{6,}|libjpeg|zlib|PIL\b"
MESSAGES = messages_of(world(3))
GOOD = {"model": "tiny:greedy", "messages": MESSAGES, "seed": 5, "max_completion_tokens": 256}


def error_of(reply: httpx.Response) -> dict:
    """The error that a reply holds. It must have OpenAI's shape, and say nothing of the server's insides."""
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert len(error["message"]) < 1100
    assert not re.search(LEAKS, reply.text)
    return error


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
WRONG = [
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
]


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
