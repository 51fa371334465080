"""A real HTTP server of the chat completions protocol whose faults are scripted: ``python chat_server.py PORT_FILE``.

What it does with a request stands in the request: a question with ``[fault 429]`` fails so the first time it is asked,
one with ``[always 500]`` each time. A conclusion says what the standard answer says, unless the question has
``[wrong]``; then the judge is asked, and says what stands in ``[judge ...]``. ``GET /log`` is all that it was asked.
"""

import contextlib
import json
import re
import socket
import struct
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

TAGS = "SUMMARY", "CAPTION", "REASONING", "CONCLUSION"
VERDICTS = {
    "valid": '{"reason": "same", "verdict": "valid"}',
    "invalid": '{"reason": "another number", "verdict": "invalid"}',
    "fenced": '```json\n{"reason": "same", "verdict": "valid"}\n```',
    "empty": "",
    "prose": "The answer is valid.",
    "both": '{"verdict": "invalid", "verdict": "valid"}',
    "list": '[{"verdict": "valid"}]',
    "loud": '{"reason": "", "verdict": "Valid, I think"}',
    "true": '{"reason": "", "verdict": true}',
    "twice": '{"verdict": "valid"} {"verdict": "invalid"}',
    "refuses": None,
}
FOUR = "<SUMMARY> a </SUMMARY> <CAPTION> b </CAPTION> <REASONING> c </REASONING> <CONCLUSION> 4 </CONCLUSION>"
REPLIES = {
    "no tags": "It is four.",
    "outside": f"Sure! {FOUR}",
    "empty stage": FOUR.replace(" a ", " "),
    "special": FOUR.replace(" a ", "<|image|>"),
    "leak": FOUR.replace(" c ", " as the reference answer says "),
}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        with self.server.lock:
            body = json.dumps({"log": self.server.log, "usage": self.server.usage})
        self._send(200, body)

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        asked = _text(body["messages"][-1])
        question, is_judge = _question(asked)
        with server.lock:
            before = server.asked[question, is_judge]
            server.asked[question, is_judge] += 1
            entry = {"time": time.monotonic(), "question": question, "judge": is_judge, "body": body, "status": 200}
            entry["key"] = self.headers.get("authorization")
            server.log.append(entry)
        time.sleep(server.delay)
        fault = re.search(r"\[(fault|always) ([^]]+)\]", question)
        if fault and not is_judge and (fault[1] == "always" or before == 0) and self._fail(fault[2], entry):
            return
        if is_judge and "[no schema]" in question and "response_format" in body:
            entry["status"] = 400
            self._send(400, json.dumps({"error": {"message": "response_format is not supported"}}))
            return
        message = _verdict(question) if is_judge else _annotation(question, asked, fault, before)
        usage = {"prompt_tokens": len(asked) // 4 + 1, "completion_tokens": 7 + len(question) % 5}
        with server.lock:
            for name, count in usage.items():
                server.usage[name] += count
        choice = {"index": 0, "message": {"role": "assistant", **message}, "finish_reason": "stop"}
        self._send(200, json.dumps({"id": "x", "model": "served", "choices": [choice], "usage": usage}))

    def _fail(self, fault, entry):
        """Whether the fault is one of the transport, which is then done."""
        if fault.isdigit():
            entry["status"] = int(fault)
            headers = {"retry-after": "0.7"} if fault == "429" else {}
            self._send(int(fault), json.dumps({"error": {"message": f"scripted {fault}"}}), headers)
        elif fault == "hang":
            self.rfile.read(1)  # until the client has gone
            self.close_connection = True
        elif fault == "drip":
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", "1000000")
            self.end_headers()
            while True:  # until the client has gone
                time.sleep(0.2)
                self.wfile.write(b" ")
        elif fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
        elif fault == "malformed":
            self._send(200, '{"choices": [{"mess')
        elif fault == "no choices":
            self._send(200, json.dumps({"id": "x", "choices": []}))
        elif fault == "null message":
            self._send(200, json.dumps({"id": "x", "choices": [{"message": None}]}))
        elif fault == "html":
            self._send(200, "<html>busy</html>", {"content-type": "text/html"})
        else:
            return False
        return True

    def _send(self, status, body, headers=()):
        data = body.encode()
        self.send_response(status)
        for name, value in {"content-type": "application/json", **dict(headers)}.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass

    def handle(self):
        with contextlib.suppress(OSError, ValueError):  # the client has gone, as one that is killed does
            super().handle()


def _annotation(question, asked, fault, before):
    if fault and fault[2] == "refusal":
        return {"content": None, "refusal": "I can't help with that."}
    if fault and fault[2] in REPLIES and (fault[1] == "always" or before == 0):
        return {"content": REPLIES[fault[2]]}
    answer = re.search(r"The right answer:\n(.*?)(\n\n|$)", asked, re.DOTALL)[1]
    said = "something else" if "[wrong]" in question else answer
    sections = dict(zip(TAGS, ("We look.", "A picture.", "It follows.", said)))
    return {"content": "\n".join(f"<{tag}>{text}</{tag}>" for tag, text in sections.items())}


def _verdict(question):
    content = VERDICTS[re.search(r"\[judge (\w+)\]", question)[1]]
    return {"content": content} if content is not None else {"content": None, "refusal": "no"}


def _question(asked):
    if data := re.search(r'^\{"question": .*\}$', asked, re.MULTILINE):
        return json.loads(data[0])["question"], True
    return re.search(r"Question:\n(.*?)\n\nThe right answer:", asked, re.DOTALL)[1], False


def _text(message):
    content = message["content"]
    return content if isinstance(content, str) else content[-1]["text"]


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, delay=0.0):
        super().__init__(("127.0.0.1", 0), Handler)
        self.delay, self.lock, self.log, self.asked = delay, threading.Lock(), [], Counter()
        self.usage = Counter(prompt_tokens=0, completion_tokens=0)


if __name__ == "__main__":
    running = Server(float(sys.argv[2]))
    part = Path(sys.argv[1] + ".part")
    part.write_text(str(running.server_address[1]))
    part.rename(sys.argv[1])
    running.serve_forever()
