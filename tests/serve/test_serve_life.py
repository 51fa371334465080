"""Clients that go away, and servers that end."""

import asyncio
import json
import signal
import socket
import threading
from threading import Thread
from urllib.parse import urlsplit

import httpx
import pytest
from helpers.serving import DEADLINE, messages_of, serving, world
from starlette.testclient import TestClient

from llava_cot import SwiresGenerator
from llava_cot.serve import app as application
from llava_cot.serve.app import create_app

LONG = {"model": "tiny", "messages": messages_of(world(3)), "seed": 5, "llava_cot": {"settings": {"candidates": 8}}}


def address_of(url):
    at = urlsplit(url)
    return at.hostname, at.port


def send(url, body):
    """A connection on which a request has been sent."""
    data, connection = json.dumps(body).encode(), socket.create_connection(address_of(url), DEADLINE)
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    return connection


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_ends_its_search(server, stream):
    before = server.metrics()
    connection = send(server.url, {**LONG, "stream": stream})
    while not server.metrics()["num_searches_running"]:
        pass
    connection.close()
    after = server.wait_until_idle()
    assert after["request_aborted_total"] == before["request_aborted_total"] + 1
    assert after["generations_per_request_count"] == before["generations_per_request_count"]
    server.assert_nothing_held()


def test_sigterm_lets_what_is_in_flight_finish():
    with serving("--drain", str(DEADLINE)) as served:
        replies = []
        thread = Thread(
            target=lambda: replies.append(httpx.post(f"{served.url}/v1/chat/completions", json=LONG, timeout=DEADLINE))
        )
        thread.start()
        while not served.metrics()["num_searches_running"]:
            pass
        served.process.send_signal(signal.SIGTERM)
        thread.join(DEADLINE)
        assert served.process.wait(DEADLINE) == 0
        assert replies[0].status_code == 200 and replies[0].json()["choices"][0]["message"]["content"]


def test_what_is_in_flight_after_the_time_to_drain_is_told_so():
    with serving("--drain", "0") as served:
        connections = [send(served.url, {**LONG, "stream": stream}) for stream in (False, True)]
        while served.metrics()["num_searches_running"] < 2:
            pass
        served.process.send_signal(signal.SIGTERM)
        for connection, status in zip(connections, (503, 200)):
            reply = connection.recv(65536)
            while part := connection.recv(65536):
                reply += part
            connection.close()
            assert reply.startswith(b"HTTP/1.1 %d " % status)
            assert b"The server is shutting down." in reply and b"[DONE]" not in reply
        assert served.process.wait(DEADLINE) == 0
    assert not [line for line in served.lines if "Traceback" in line]


def test_sigterm_gives_up_a_body_that_is_still_arriving():
    with serving() as served, socket.create_connection(address_of(served.url), DEADLINE) as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b'Content-Length: 100\r\n\r\n{"model"'
        )
        while not served.metrics()["held_bytes"]:
            pass
        served.process.send_signal(signal.SIGTERM)
        reply = b""
        while part := connection.recv(65536):
            reply += part
        assert reply.startswith(b"HTTP/1.1 503 ") and b"The server is shutting down." in reply
        assert served.process.wait(DEADLINE) == 0
    assert not [line for line in served.lines if "Traceback" in line]


def test_an_application_that_ends_ends_its_threads(tiny):
    before = {*threading.enumerate()}
    app = create_app(SwiresGenerator(tiny.model, tiny.processor), name="tiny")
    with TestClient(app, "http://localhost") as client:
        assert client.post("/v1/chat/completions", json={**LONG, "model": "tiny:greedy", "llava_cot": {}}).is_success
        started = {*threading.enumerate()} - before
        assert any(thread.name.startswith("images") for thread in started)
    for thread in started:
        thread.join(DEADLINE)
        assert not thread.is_alive(), thread


def test_a_client_that_does_not_read_its_stream_is_dropped(tiny, monkeypatch):
    monkeypatch.setattr(application, "SEND_TIMEOUT", 0.01)
    generator = SwiresGenerator(tiny.model, tiny.processor)
    app, bodies = create_app(generator, name="tiny"), [json.dumps({**LONG, "stream": True}).encode()]

    async def receive():
        return {"type": "http.request", "body": bodies.pop()} if bodies else await asyncio.Event().wait()

    async def send(message):
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()  # as where the connection takes no more

    async def run():
        headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
        path = "/v1/chat/completions"
        scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "headers": headers}
        async with app.router.lifespan_context(app):
            await app(scope, receive, send)

    asyncio.run(run())
    assert generator.engine.pages_in_use == 0


def test_a_killed_server_ends_its_streams_with_an_error_and_starts_again():
    with serving() as served:
        connections = [send(served.url, {**LONG, "stream": True, "seed": seed}) for seed in range(50)]
        heads = [connection.recv(1) for connection in connections]  # all streams have begun
        assert all(heads)
        served.process.kill()
        served.process.wait(DEADLINE)
        for connection in connections:
            rest = b""
            try:
                while part := connection.recv(65536):
                    rest += part
            except ConnectionError:
                pass
            assert b"[DONE]" not in rest
            connection.close()
    with serving() as served:
        ask = {**LONG, "model": "tiny:greedy", "llava_cot": {}}
        assert httpx.post(f"{served.url}/v1/chat/completions", json=ask, timeout=DEADLINE).status_code == 200
