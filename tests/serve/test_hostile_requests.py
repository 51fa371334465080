"""Hostile requests to a real server: each is refused in its own words, and at the end nothing of them is held."""

import json
import re
import socket

import httpx
import pytest
from helpers.hostile import (
    BODIES,
    BROKEN,
    CHAT,
    CONTINUED,
    DECISIONS,
    GOOD,
    IMAGES,
    MESSAGES,
    RAW,
    RESPONSES,
    SWIRES,
    WRONG,
    asked,
    error_of,
    image,
    own,
    png,
    said,
    uri,
)
from helpers.serving import serving

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
    assert words in error_of(reply)["message"]


def post(served, body: object, path: str = CHAT) -> httpx.Response:
    return httpx.post(served.url + path, json=body, timeout=300)


# Changes of a good chat request that these limits don't allow -> what is said of them
CAPPED = [
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
    ({**RAW, **own(output="raw", seeds=[0, 2**63])}, f"llava_cot.seeds must be in [0, 2**63), got {2**63}"),
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


CHANGES = [*WRONG, *CAPPED]


@pytest.mark.parametrize("change, words", CHANGES, ids=[f"{at}-{words[:40]}" for at, (_, words) in enumerate(CHANGES)])
def test_a_chat_request_is_refused_before_anything_is_queued(hostile, change, words):
    found = post(hostile, {**GOOD, **change})
    refused(hostile, found, 404 if found.status_code == 404 and "lists" in words else 400, words)


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
