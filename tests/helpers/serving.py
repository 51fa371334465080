"""A real server in a process of its own, and what to ask it."""

import base64
import io
import os
import re
import signal
import subprocess
import sys
import time
from collections import deque
from contextlib import contextmanager
from threading import Thread

import httpx
import openai

from llava_cot.data import shapes

DEADLINE = 300  # seconds; nothing takes so long unless it hangs


class Served:
    """A running ``llava-cot serve``."""

    def __init__(self, process, url, lines):
        self.process, self.url, self.lines = process, url, lines

    def client(self, **options):
        return openai.OpenAI(
            base_url=f"{self.url}/v1", **{"api_key": "none", "max_retries": 0, "timeout": DEADLINE, **options}
        )

    def metrics(self, **headers):
        """The values of all metrics without labels, by name without the prefix."""
        text = httpx.get(f"{self.url}/metrics", headers=headers).text
        return {
            name: float(value) for name, value in re.findall(r"^llava_cot:(\w+)(?:\{.*?\})? (\S+)$", text, re.MULTILINE)
        }

    def wait_until_idle(self):
        """Wait until nothing is in flight, and return the metrics then."""
        end = time.monotonic() + DEADLINE
        while time.monotonic() < end:
            found = self.metrics()
            if not (found["num_requests_in_flight"] or found["num_searches_running"] or found["num_searches_waiting"]):
                return found
            time.sleep(0.05)
        raise AssertionError(f"still busy: {found}")

    def assert_nothing_held(self):
        found = self.wait_until_idle()
        assert found["kv_cache_usage_perc"] == 0
        assert found["num_images_held"] == 0
        assert found["held_bytes"] == found["held_pixels"] == 0


@contextmanager
def serving(*options, model="tiny", env=()):
    """Start ``llava-cot serve`` on a free port, and end it afterwards."""
    command = [sys.executable, "-m", "llava_cot.cli", "serve", "--model", model, "--port", "0", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **dict(env)}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    lines = deque(maxlen=1000)
    try:
        for line in process.stderr:
            lines.append(line)
            if found := re.search(r"running on (http://\S+)", line):
                break
        else:
            raise AssertionError("".join(lines))
        Thread(target=lines.extend, args=(process.stderr,), daemon=True).start()  # or its pipe would fill up
        yield Served(process, found[1], lines)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.wait(DEADLINE)


def data_uri(image, format="PNG"):
    """The image as a data URI."""
    file = io.BytesIO()
    image.save(file, format)
    return f"data:image/{format.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def messages_of(sample):
    """The conversation that asks the question of a sample of the bundled world."""
    image = {"type": "image_url", "image_url": {"url": data_uri(sample.image)}}
    return [{"role": "user", "content": [image, {"type": "text", "text": sample.question}]}]


def world(index):
    """A sample that the bundled model was not trained on."""
    return shapes.sample(shapes.TEST_SEEDS[index])
