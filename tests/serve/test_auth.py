"""Who may send a request, over real connections to a real uvicorn: keys, names, types, sizes and times."""

import base64
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import uvicorn

from llava_cot.serve import auth
from llava_cot.serve.auth import Guard, check_bind, is_loopback, read_keys
from llava_cot.serve.gate import Gate
from llava_cot.serve.held import Held
from llava_cot.serve.limits import Limits
from llava_cot.serve.protocol import with_header_timeout

LIMITS = Limits(max_body_bytes=1000, max_body_seconds=600.0)
KEYS = ("first-key", "second:key")
PATIENT = with_header_timeout(600.0)
JSON = "Content-Type: application/json"
BEARER = f"Authorization: Bearer {KEYS[0]}"


async def echo(scope, receive, send):
    """Answers with the path and the body, in capitals if it came in one message, as it must."""
    message = await receive()
    body = message["body"] if message["more_body"] else message["body"].upper()
    reply = scope["path"].encode() + b" " + body
    headers = [(b"content-length", str(len(reply)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": reply})


@contextmanager
def serving(keys=(), limits=LIMITS, host="127.0.0.1", protocol=PATIENT, held=None, gate=None) -> Iterator[int]:
    listener = socket.create_server(("127.0.0.1", 0))
    guard = Guard(echo, keys, host, limits, held or Held(limits), gate or Gate(1))
    config = uvicorn.Config(guard, log_level="critical", lifespan="off", http=protocol)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


@pytest.fixture(scope="module")
def guarded() -> Iterator[int]:
    with serving(KEYS) as port:
        yield port


@pytest.fixture(scope="module")
def local() -> Iterator[int]:
    with serving() as port:
        yield port


def exchange(port: int, request: bytes) -> tuple[int, dict[str, str], bytes]:
    """Send bytes and read until the server closes the connection: the status, the headers and the body."""
    with socket.create_connection(("127.0.0.1", port), timeout=120) as connection:
        connection.sendall(request)
        reply = b""
        while data := connection.recv(2**16):
            reply += data
    head, _, body = reply.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    return int(first.split()[1]), dict(line.lower().split(": ", 1) for line in lines), body


def ask(
    port: int, path: str = "/v1/models", *headers: str, method: str = "GET", body: bytes = b"", host="localhost:80"
):
    lines = [f"{method} {path} HTTP/1.1", f"Host: {host}", "Connection: close", *headers]
    if body and not any(header.startswith(("Content-Length", "Transfer-Encoding")) for header in headers):
        lines.append(f"Content-Length: {len(body)}")
    return exchange(port, "\r\n".join([*lines, "", ""]).encode("latin-1") + body)


def basic(text: str) -> str:
    return f"Authorization: Basic {base64.b64encode(text.encode()).decode()}"


@pytest.mark.parametrize(
    "header",
    [
        *(f"Authorization: Bearer {key}" for key in KEYS),
        f"authorization: bearer   {KEYS[0]} ",
        *(basic(f"{user}:{key}") for user in ("", "user") for key in KEYS),
    ],
)
def test_a_key_opens_each_route(guarded, header):
    assert ask(guarded, "/v1/models", header)[::2] == (200, b"/v1/models ")
    assert ask(guarded, "/x", header, JSON, method="POST", body=b"body")[::2] == (200, b"/x BODY")


@pytest.mark.parametrize(
    "headers",
    [
        (),
        ("Authorization:",),
        ("Authorization: Bearer",),
        ("Authorization: Bearer ",),
        ("Authorization: Bearer wrong",),
        (f"Authorization: Bearer {KEYS[0]}x",),
        (f"Authorization: Bearer {KEYS[0][:-1]}",),
        (f"Authorization: Bearer {','.join(KEYS)}",),
        (f"Authorization: {KEYS[0]}",),
        (f"Authorization: Token {KEYS[0]}",),
        ("Authorization: Bearer \xff\xfe",),
        ("Authorization: Basic !!!",),
        ("Authorization: Basic",),
        (basic(KEYS[0]),),
        (basic(f"{KEYS[0]}:"),),
        (basic("user:second"),),
        (basic("user:key"),),
        (BEARER, "Authorization: Bearer wrong"),
        (f"X-API-Key: {KEYS[0]}",),
        (f"Cookie: key={KEYS[0]}",),
    ],
)
@pytest.mark.parametrize(
    "path", ["/v1/models", "/", "/metrics", "/health/", "//health", "/HEALTH", "/page/../health", "/x?/health"]
)
def test_without_the_key_no_route_but_health_opens(guarded, headers, path):
    status, found, body = ask(guarded, path, *headers)
    assert status == 401
    assert found["www-authenticate"] == 'basic realm="llava-cot"'
    assert json.loads(body) == {
        "error": {
            "message": "The API key is missing or wrong.",
            "type": "authentication_error",
            "param": None,
            "code": "invalid_api_key",
        }
    }


@pytest.mark.parametrize("path", ["/health", "/live"])
def test_health_needs_no_key_and_no_loopback_name(guarded, local, path):
    assert ask(guarded, path)[0] == 200
    assert ask(local, path, host="pod.cluster")[0] == 200


def test_a_key_in_the_url_is_none(guarded):
    assert ask(guarded, f"/v1/models?api_key={KEYS[0]}&Authorization=Bearer%20{KEYS[0]}")[0] == 401


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:8000", "LOCALHOST:80", "127.0.0.1:1", "127.9.9.9", "[::1]:80"]
)
def test_without_keys_a_loopback_name_is_answered(local, host):
    assert ask(local, host=host)[0] == 200


@pytest.mark.parametrize(
    "host",
    [
        *("evil.test", "evil.test:8000", "localhost.evil.test", "127.0.0.1.evil.test", "192.168.0.1", "0.0.0.0", ""),
        *(
            "localhost@evil.test",
            "127.1",
            "2130706433",
            "[::]",
            "[::ffff:8.8.8.8]",
            "localhost:80:80",
            "evil.test#localhost",
        ),
    ],
)
def test_without_keys_a_foreign_name_is_refused(local, host):
    status, _, body = ask(local, host=host)
    assert (status, json.loads(body)["error"]["code"]) == (403, "host")


def test_a_request_without_a_host_is_refused(local):
    assert exchange(local, b"GET / HTTP/1.0\r\n\r\n")[0] == 403
    assert exchange(local, b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n")[0] == 400
    assert exchange(local, b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil.test\r\n\r\n")[0] == 400


def test_with_a_key_or_on_an_open_address_any_name_is_answered(guarded):
    assert ask(guarded, "/", BEARER, host="evil.test")[0] == 200
    with serving(host="0.0.0.0") as port:
        assert ask(port, host="evil.test")[0] == 200


@pytest.mark.parametrize(
    "headers",
    [
        *((), ("Content-Type: text/plain",), ("Content-Type: application/x-www-form-urlencoded",)),
        *(("Content-Type: multipart/form-data; boundary=x",), ("Content-Type: application/jsonp",)),
        *(("Content-Type: text/plain; application/json",), (JSON, "Content-Type: text/plain"), ("Content-Type:",)),
    ],
)
@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "BREW"])
def test_what_a_foreign_page_could_send_unasked_is_refused(local, headers, method):
    status, found, body = ask(local, "/v1/chat/completions", *headers, method=method, body=b"{}")
    assert (status, json.loads(body)["error"]["code"]) == (415, "content_type")
    assert not any(name.startswith("access-control") for name in found)


def test_json_with_a_charset_passes_and_a_compressed_body_does_not(local):
    assert ask(local, "/x", f"{JSON}; charset=utf-8", method="POST", body=b"body")[2] == b"/x BODY"
    status, _, body = ask(local, "/x", JSON, "Content-Encoding: gzip", method="POST", body=b"body")
    assert (status, json.loads(body)["error"]["code"]) == (415, "content_encoding")


def test_a_preflight_is_never_granted(local):
    _, headers, _ = ask(
        local, "/x", "Origin: https://evil.test", "Access-Control-Request-Method: POST", method="OPTIONS"
    )
    assert not any(name.startswith("access-control") for name in headers)


CHUNK = b"1\r\na\r\n"


@pytest.mark.parametrize(
    "headers, body",
    [
        (("Content-Length: 1001",), b"a" * 1001),
        (("Content-Length: 1001",), b""),  # refused before it has arrived
        (("Content-Length: 1001", "Expect: 100-continue"), b""),
        (("Content-Length: " + "9" * 18,), b""),
        (("Transfer-Encoding: chunked",), CHUNK * 1001),
        (("Transfer-Encoding: chunked",), b"3e9\r\n" + b"a" * 1001),
    ],
)
def test_a_body_that_is_too_large_is_refused(local, headers, body, monkeypatch):
    monkeypatch.setattr(auth, "LINGER", 0.1)
    status, found, reply = ask(local, "/x", JSON, *headers, method="POST", body=body)
    assert (status, found["connection"]) == (413, "close")
    assert json.loads(reply)["error"] == {
        "message": "The body may have at most 1000 bytes.",
        "type": "invalid_request_error",
        "param": None,
        "code": "body_too_large",
    }


@pytest.mark.parametrize("headers, status", [((JSON, BEARER), 413), ((BEARER,), 415), ((JSON,), 401)])
def test_a_client_that_is_still_sending_can_read_why_it_is_refused(headers, status):
    with serving(KEYS, Limits(max_body_bytes=2**20)) as port:
        assert ask(port, "/x", *headers, method="POST", body=b"a" * 3 * 2**20)[0] == status


def test_a_body_of_the_largest_size_arrives_whole(local):
    assert ask(local, "/x", JSON, method="POST", body=b"a" * 1000)[2] == b"/x " + b"A" * 1000
    chunked = ask(local, "/x", JSON, "Transfer-Encoding: chunked", method="POST", body=CHUNK * 1000 + b"0\r\n\r\n")
    assert chunked[2] == b"/x " + b"A" * 1000


@pytest.mark.parametrize(
    "lines, status",
    [
        (["Content-Length: 1", "Transfer-Encoding: chunked"], 400),
        *((["Content-Length: -1"], 400), (["Content-Length: 1", "Content-Length: 2"], 400), (["Bad Header: 1"], 400)),
        *((["Content-Length: abc"], 400), (["Transfer-Encoding: gzip"], 400), ([": empty"], 400), (["X: \0"], 400)),
        *(
            (["Transfer-Encoding: chunked, chunked"], 400),
            (["X: a\rb: c"], 400),
            (["X : 1"], 400),
            ([" folded: 1"], 400),
        ),
        *(([f"X: {'a' * 20_000}"], 431), ([f"X-{number}: 1" for number in range(200)], 431)),
    ],
    ids=range(14),
)
def test_broken_and_huge_headers_are_refused(local, lines, status):
    request = "\r\n".join(["POST /x HTTP/1.1", *lines, "Host: localhost", JSON, "Connection: close", "", ""])
    assert exchange(local, request.encode("latin-1"))[0] == status


@pytest.mark.parametrize("path", ["/health", "/live"])
@pytest.mark.parametrize("header, body", [("Content-Length: 1", b"a"), ("Transfer-Encoding: chunked", CHUNK)])
def test_who_needs_no_key_may_send_no_body(path, header, body, monkeypatch):
    """Bodies of strangers would fill the memory that all requests share."""
    monkeypatch.setattr(auth, "LINGER", 0.1)
    with serving(KEYS) as port:
        status, _, reply = ask(port, path, header, method="POST", body=body)
        assert (status, json.loads(reply)["error"]["message"]) == (413, "The body may have at most 0 bytes.")


def test_a_slow_body_is_given_up():
    with serving(limits=Limits(max_body_seconds=0.2)) as port:
        status, headers, body = ask(port, "/x", JSON, "Content-Length: 10", method="POST", body=b"a")
        assert (status, headers["connection"]) == (408, "close")
        assert json.loads(body)["error"]["message"] == "The body did not arrive in 0.2 seconds."
        assert ask(port)[0] == 200


def test_all_requests_together_hold_at_most_so_many_bytes():
    limits = Limits(max_body_bytes=1000, max_body_seconds=600.0, max_held_bytes=1000)
    held = Held(limits)
    with serving(limits=limits, held=held) as port:
        with socket.create_connection(("127.0.0.1", port)) as slow:
            slow.sendall(
                f"POST /x HTTP/1.1\r\nHost: localhost\r\n{JSON}\r\nContent-Length: 900\r\n\r\n".encode() + b"a" * 700
            )
            while held.bytes < 700:
                pass
            status, headers, body = ask(port, "/x", JSON, method="POST", body=b"a" * 700)
            assert status == 429 and headers["retry-after"]
            assert json.loads(body)["error"]["code"] == "memory_full"
            assert ask(port, "/x", JSON, method="POST", body=b"a" * 300)[0] == 200
        while held.bytes:
            pass
        assert ask(port, "/x", JSON, method="POST", body=b"a" * 1000)[0] == 200


@pytest.mark.parametrize("start", [b"", b"G", b"GET / HTTP/1.1\r\nHost: local", b"POST / HTTP/1.1\r\nX: 1\r\n"])
def test_slow_headers_are_given_up(start):
    with serving(protocol=with_header_timeout(0.2)) as port:
        assert exchange(port, start)[0] == 408


@pytest.mark.parametrize(
    "second, said",
    [
        (b"GET /x HTTP/1.1\r\nHo", b"HTTP/1.1 408 Request Timeout"),
        (
            f"POST /x HTTP/1.1\r\nHost: localhost\r\n{JSON}\r\nContent-Length: 9\r\n\r\na".encode(),
            b"The body did not arrive in 0.5 seconds.",
        ),
    ],
)
def test_the_time_for_headers_starts_with_each_request_and_is_not_that_of_the_body(second, said):
    protocol = with_header_timeout(600.0)
    with serving(limits=Limits(max_body_seconds=0.5), protocol=protocol) as port:
        with socket.create_connection(("127.0.0.1", port), timeout=120) as connection:
            connection.sendall(b"GET /x HTTP/1.1\r\nHost: localhost\r\n\r\n")
            reply = connection.recv(2**16)
            assert reply.startswith(b"HTTP/1.1 200")
            protocol.seconds = 0.2  # for what comes now
            connection.sendall(second)
            while data := connection.recv(2**16):
                reply += data
        assert said in reply


def test_a_client_that_goes_before_its_body_is_there_gets_no_app():
    called = threading.Event()

    async def app(scope, receive, send):
        called.set()

    async def run() -> list:
        messages = iter([{"type": "http.request", "body": b"a", "more_body": True}, {"type": "http.disconnect"}])

        async def receive():
            return next(messages)

        async def send(message):
            sent.append(message)

        sent: list = []
        scope = {"type": "http", "method": "GET", "path": "/", "headers": [(b"host", b"localhost")]}
        await Guard(app, (), "127.0.0.1", LIMITS, Held(LIMITS), Gate(1))(scope, receive, send)
        return sent

    import asyncio

    assert asyncio.run(run()) == []
    assert not called.is_set()


def test_an_empty_key_would_be_no_lock():
    with pytest.raises(ValueError, match="keys must not be empty"):
        Guard(echo, ["key", ""], "127.0.0.1", LIMITS, Held(LIMITS), Gate(1))


@pytest.mark.parametrize(
    "host, keys, allow, ok",
    [
        *(("127.0.0.1", (), False, True), ("localhost", (), False, True), ("::1", (), False, True)),
        *(("0.0.0.0", (), False, False), ("::", (), False, False), ("192.168.0.2", (), False, False)),
        *(("", (), False, False), ("example.com", (), False, False), ("0.0.0.0", ("",), False, False)),
        *(("0.0.0.0", ("key",), False, True), ("0.0.0.0", (), True, True)),
    ],
)
def test_an_open_address_needs_a_key_or_the_flag(host, keys, allow, ok):
    if ok:
        check_bind(host, keys, allow)
    else:
        with pytest.raises(
            ValueError, match=r"host must be a loopback address such as 127.0.0.1 if .* LLAVA_COT_API_KEY"
        ):
            check_bind(host, keys, allow)


def test_keys_come_from_the_environment_and_from_a_file(tmp_path):
    file = tmp_path / "keys"
    file.write_text("three\n\n four \n")
    assert read_keys(None, {}) == ()
    assert read_keys(file, {"LLAVA_COT_API_KEY": "one, two"}) == ("one", "two", "three", "four")
    with pytest.raises(ValueError, match="LLAVA_COT_API_KEY must have at least one API key, got none"):
        read_keys(None, {"LLAVA_COT_API_KEY": " , "})
    file.write_text("\n")
    with pytest.raises(ValueError, match=r"the file .*keys must have at least one API key, got none"):
        read_keys(file, {})
    for bad in ("a b", "k\u00e9y", "a\x7f"):
        with pytest.raises(ValueError, match=r"an API key of .* must be printable ASCII without spaces") as caught:
            read_keys(None, {"LLAVA_COT_API_KEY": bad})
        assert bad not in str(caught.value)  # it is a secret


@pytest.mark.parametrize("host", ["localhost.", "127.0.0.1.", "::ffff:7f00:1%lo", "0", "loopback"])
def test_what_is_not_surely_loopback_is_not(host):
    assert not is_loopback(host)
