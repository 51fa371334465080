"""What ``/metrics`` shows, in Prometheus' text format. The names are those of vLLM where it has the same quantity."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from llava_cot.answer import Answer
from llava_cot.core import Usage
from llava_cot.engine.engine import Engine
from llava_cot.serve.gate import Gate
from llava_cot.serve.held import Held

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
GENERATIONS = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """Counters of one server. Every name begins with ``llava_cot:``."""

    def __init__(self, engine: Engine, gate: Gate, held: Held) -> None:
        self._registry = registry = CollectorRegistry()

        def gauge(name: str, words: str, read: Callable[[], float]) -> None:
            Gauge(f"llava_cot:{name}", words, registry=registry).set_function(read)

        def counter(name: str, words: str, labels: Sequence[str] = ()) -> Counter:
            return Counter(f"llava_cot:{name}", words, labels, registry=registry)

        def histogram(name: str, words: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(f"llava_cot:{name}", words, registry=registry, buckets=buckets)

        pool = engine.pool
        gauge("num_requests_in_flight", "Requests that have been let in and not answered.", lambda: gate.in_flight)
        gauge("held_bytes", "Bytes of bodies and image files that requests hold.", lambda: held.bytes)
        gauge("held_pixels", "Decoded pixels that requests hold.", lambda: held.pixels)
        gauge("num_searches_running", "Searches that hold pages.", lambda: len(engine.schedule.running))
        gauge(
            "num_searches_waiting",
            "Searches that wait to be admitted.",
            lambda: len(engine.schedule.waiting) + len(engine.schedule.inbox),
        )
        gauge(
            "kv_cache_usage_perc",
            "The share of KV pages in use, in [0, 1].",
            lambda: engine.pages_in_use / pool.num_pages,
        )
        gauge("num_images_held", "Images whose keys and values are stored.", lambda: engine.images_in_use)
        self._success = counter("request_success", "Requests that were answered.", ["finished_reason", "search"])
        self._aborted = counter("request_aborted", "Requests whose client had gone, or that a shutdown ended.")
        self._failed = counter("request_failed", "Requests whose search failed.")
        self._rejected = counter("request_rejected", "Requests that were refused, by status.", ["status"])
        self._prompt_tokens = counter("prompt_tokens", "Tokens prefilled.")
        self._generation_tokens = counter("generation_tokens", "Tokens drawn, those of discarded candidates included.")
        self._retraces = counter("retraces", "Times that a search went back a stage.")
        self._latency = histogram("e2e_request_latency_seconds", "From the checked request to its last token.", SECONDS)
        self._first = histogram("time_to_first_token_seconds", "To the first text that stands.", SECONDS)
        self._generations = histogram("generations_per_request", "Candidates drawn for one request.", GENERATIONS)

    def refused(self, status: int) -> None:
        """Count a request that was refused."""
        self._rejected.labels(status).inc()

    def text(self) -> bytes:
        """Return all of it in Prometheus' text format."""
        return generate_latest(self._registry)

    @contextmanager
    def request(self, search: str) -> Iterator["Measured"]:
        """Time one request, and count how it ends."""
        measured = Measured(self, search)
        try:
            yield measured
        except Exception:
            self._failed.inc()
            raise
        except BaseException:
            self._aborted.inc()
            raise
        if not measured.is_counted:
            self._aborted.inc()

    def note(self, measured: "Measured", usage: Usage, reason: str, retraces: int) -> None:
        """Count an answered request."""
        now = time.monotonic() - measured.since
        self._success.labels(reason, measured.search).inc()
        self._prompt_tokens.inc(usage.prompt_tokens)
        self._generation_tokens.inc(usage.generated_tokens)
        self._retraces.inc(retraces)
        self._generations.observe(usage.generations)
        self._latency.observe(now)
        self._first.observe(measured.first if measured.first is not None else now)


class Measured:
    """One request as it runs."""

    def __init__(self, metrics: Metrics, search: str) -> None:
        self._metrics, self.search, self.since = metrics, search, time.monotonic()
        self.first: float | None = None  # seconds from the start
        self.is_counted = False

    def first_token(self) -> None:
        """Note that text has been sent."""
        if self.first is None:
            self.first = time.monotonic() - self.since

    def done(self, answers: Sequence[Answer]) -> None:
        """Note the answers of the request."""
        for answer in answers:
            retraces = len(answer.trace.events("retraced"))
            self.count(answer.usage, "stop" if answer.ended else "length", retraces)

    def count(self, usage: Usage, reason: str, retraces: int = 0) -> None:
        """Note what one search of the request has cost."""
        self.is_counted = True
        self._metrics.note(self, usage, reason, retraces)
