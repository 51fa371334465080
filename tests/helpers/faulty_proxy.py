"""A proxy in front of a real server that spoils replies on order: a status, a broken body or a dropped connection."""

import socket
import struct
import threading
from collections import deque
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self._pass_on("GET", b"")

    def do_POST(self):
        self._pass_on("POST", self.rfile.read(int(self.headers["content-length"])))

    def _pass_on(self, method, body):
        faults = self.server.faults if method == "POST" else ()
        fault = faults.popleft() if faults else None
        if fault == "drop":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            return self.connection.close()
        if fault is None:
            headers = {name: self.headers.get(name, "") for name in ("authorization", "content-type")}
            reply = httpx.request(method, self.server.target + self.path, content=body, headers=headers, timeout=300)
            fault = (reply.status_code, reply.content, {})
        status, content, headers = fault
        self.send_response(status)
        for name, value in {"content-type": "application/json", "content-length": len(content), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


@contextmanager
def proxying(target):
    """Start the proxy. ``faults`` of what is yielded are the next replies: "drop" or (status, body, headers)."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.target, server.faults = target, deque()
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
