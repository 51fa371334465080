"""Run over a file of questions. A run can resume, has limits, stops cleanly and counts its cost."""

import asyncio
import math
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from llava_cot.data.annotation.client import Chat, ChatClient
from llava_cot.data.annotation.cost import Estimate, Prices, Usage
from llava_cot.data.annotation.estimate import estimate_run
from llava_cot.data.annotation.past import ANNOTATION, Past, drop_stale, read_past
from llava_cot.data.annotation.questions import Question, read_questions
from llava_cot.data.annotation.record import Annotator
from llava_cot.journal import Journal, check_journal

GRACE_SECONDS = 20.0  # for requests in flight when a signal arrives


@dataclass(frozen=True)
class Settings:
    """The settings of annotation, which are the options of the command line."""

    model: str
    base_url: str | None = None
    images: Path | None = None  # the folder of image paths; by default that of the questions
    concurrency: int = 8  # conversations in flight
    rpm: float | None = None  # requests a minute
    tpm: float | None = None  # tokens a minute
    timeout: float = 120.0  # seconds per request
    max_retries: int = 8
    attempts: int = 2  # the most texts requested per turn
    max_tokens: int = 2048  # per reply
    temperature: float | None = None  # None: the default of the endpoint
    seed: int | None = None
    image_tokens: int = 1000  # the estimated tokens of an image
    prices: Prices | None = None
    max_cost: float | None = None  # USD, for all runs into one file
    limit: int | None = None  # the most records of this run
    retry_rejects: bool = False

    def __post_init__(self) -> None:
        if not self.model:
            raise ValueError("model must be a name, got ''")
        least = {"concurrency": 1, "max_retries": 0, "attempts": 1, "max_tokens": 1, "image_tokens": 0, "limit": 0}
        for name, minimum in least.items():
            if (value := getattr(self, name)) is not None and value < minimum:
                raise ValueError(f"{name} must be >= {minimum}, got {value}")
        for name in ("rpm", "tpm", "timeout", "max_cost"):
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be > 0, got {value}")
        if self.max_cost is not None and self.prices is None:
            raise ValueError("max_cost needs price_in and price_out, got none")

    @property
    def options(self) -> dict[str, Any]:
        """The options of every request."""
        given = {"model": self.model, "max_completion_tokens": self.max_tokens}
        sampling = {"temperature": self.temperature, "seed": self.seed}
        return given | {name: value for name, value in sampling.items() if value is not None}


@dataclass
class Outcome:
    """The outcome of a run so far. ``usage`` is that of this run."""

    total: int  # records to do
    accepted: int = 0
    rejected: Counter[str] = field(default_factory=Counter)  # by kind
    usage: Usage = field(default_factory=Usage)
    cost: float | None = None  # USD of this run
    stopped: str = ""  # the reason for an early stop
    signal: int | None = None  # the signal that stopped it

    @property
    def done(self) -> int:
        return self.accepted + sum(self.rejected.values())


def annotate_file(
    questions: Path | str,
    out: Path | str,
    rejects: Path | str | None = None,
    settings: Settings | None = None,
    *,
    chat: Chat | None = None,
    show: Callable[[Outcome], None] = lambda outcome: None,
    **options: Any,
) -> Outcome:
    """Annotate the questions that ``out`` and ``rejects`` do not have yet, and append to both files.

    Annotation resumes after a crash; each id is written exactly once. After SIGINT or SIGTERM, requests in flight have
    20 s to finish. A second signal stops at once.

    Args:
        questions: see ``read_questions``. The whole file is read and checked before any request is sent.
        rejects: the file of rejects; by default ``out`` with the suffix ``.rejects.jsonl``.
        settings: the settings, which may also be given by name as ``options``.
        chat: what the requests are sent to; by default the endpoint at ``base_url``. It is closed at the end.
        show: a function that is called after each record.

    Raises:
        ValueError: bad input or settings, a file of another kind or in use by another run, or an endpoint that refuses
            the key, the model or the account.
    """
    settings = settings or Settings(**options)
    questions, out, rejects = _paths(questions, out, rejects)
    check_journal(out, "out")
    check_journal(rejects, "rejects")
    client = chat or ChatClient.of(settings, settings.image_tokens)
    for _ in read_questions(questions):
        pass
    accepted = Journal(out, ANNOTATION)
    try:
        rejected = Journal(rejects, ANNOTATION)
        try:
            drop_stale(out, rejected)  # an earlier run that asked rejects again may have crashed
            past = read_past(out, rejects, settings.retry_rejects)
            try:
                return asyncio.run(_Run(settings, questions, accepted, rejected, past, client, show).run())
            finally:
                if past.again:
                    drop_stale(out, rejected)
        finally:
            rejected.close()
    finally:
        accepted.close()


def estimate_file(
    questions: Path | str,
    out: Path | str,
    rejects: Path | str | None = None,
    settings: Settings | None = None,
    **options: Any,
) -> Estimate:
    """Estimate what ``annotate_file`` would still do and cost. It sends no request and writes nothing.

    If ``out`` has records the figures are their means. Otherwise they come from the lengths of the texts.
    """
    settings = settings or Settings(**options)
    questions, out, rejects = _paths(questions, out, rejects)
    for _ in read_questions(questions):
        pass
    past = read_past(out, rejects, settings.retry_rejects)
    return estimate_run(to_do(questions, past, settings.limit), past, settings.image_tokens, settings.prices)


class _Run:
    """Workers that share one iterator of questions, all in one thread."""

    def __init__(
        self,
        settings: Settings,
        questions: Path,
        accepted: Journal,
        rejected: Journal,
        past: Past,
        client: Chat,
        show: Callable[[Outcome], None],
    ) -> None:
        self._settings, self._past, self._client, self._show = settings, past, client, show
        self._accepted, self._rejected = accepted, rejected
        self._todo = to_do(questions, past, settings.limit)
        todo = to_do(questions, past, settings.limit)
        estimate = estimate_run(todo, past, settings.image_tokens, settings.prices)
        self._cost_of_record = (estimate.cost or 0.0) / max(estimate.records, 1)
        self._in_flight = 0
        self._outcome = Outcome(estimate.records, cost=None if settings.prices is None else 0.0)
        folder = questions.parent if settings.images is None else settings.images
        self._annotator = Annotator(client, folder, settings.options, settings.attempts)

    async def run(self) -> Outcome:
        self._show(self._outcome)
        workers = [asyncio.create_task(self._work()) for _ in range(self._settings.concurrency)]
        loop = asyncio.get_running_loop()
        is_main = threading.current_thread() is threading.main_thread()  # only that thread gets signals
        signals = (signal.SIGINT, signal.SIGTERM) if is_main else ()
        for number in signals:
            loop.add_signal_handler(number, self._on_signal, number, workers)
        try:
            await asyncio.gather(*workers)
        except asyncio.CancelledError:
            if self._outcome.signal is None:
                raise
        finally:
            for number in signals:
                loop.remove_signal_handler(number)
            _cancel(workers)
            await asyncio.gather(*workers, return_exceptions=True)
            await self._client.close()
        return self._outcome

    async def _work(self) -> None:
        while not self._outcome.stopped and (question := self._next()) is not None:
            before = self._past.again.get(question.id, Usage())
            usage = Usage(**before.to_dict())
            self._in_flight += 1
            try:
                is_accepted, record = await self._annotator.annotate(question, usage)
            finally:
                self._in_flight -= 1
                self._account(usage, before)
            (self._accepted if is_accepted else self._rejected).append(record)
            if is_accepted:
                self._outcome.accepted += 1
            else:
                self._outcome.rejected[record["kind"]] += 1
            self._show(self._outcome)

    def _next(self) -> Question | None:
        """Return the next question, or None if there is none or if it would exceed ``max_cost``."""
        most, outcome, prices = self._settings.max_cost, self._outcome, self._settings.prices
        if most is not None and prices is not None:
            each = self._cost_of_record if not outcome.done else (outcome.cost or 0.0) / outcome.done
            # Count requests in flight at the average cost, so that the limit holds at the end of the run.
            if prices.cost(self._past.usage) + (outcome.cost or 0.0) + (self._in_flight + 1) * each > most:
                outcome.stopped = f"max_cost={most:g} is reached: a record costs about {each:.2g}"
                return None
        return next(self._todo, None)

    def _account(self, usage: Usage, before: Usage) -> None:
        total, prices = self._outcome.usage, self._settings.prices
        total.requests += usage.requests - before.requests
        total.prompt_tokens += usage.prompt_tokens - before.prompt_tokens
        total.completion_tokens += usage.completion_tokens - before.completion_tokens
        self._outcome.cost = None if prices is None else prices.cost(total)

    def _on_signal(self, number: int, workers: list[asyncio.Task[None]]) -> None:
        if self._outcome.signal is not None:
            _cancel(workers)
            return
        self._outcome.signal, self._outcome.stopped = number, signal.Signals(number).name
        asyncio.get_running_loop().call_later(GRACE_SECONDS, _cancel, workers)


def _cancel(workers: list[asyncio.Task[None]]) -> None:
    for worker in workers:
        worker.cancel()


def _paths(questions: Path | str, out: Path | str, rejects: Path | str | None) -> tuple[Path, Path, Path]:
    questions, out = Path(questions), Path(out)
    rejects = out.with_suffix(".rejects.jsonl") if rejects is None else Path(rejects)
    if len({path.resolve() for path in (questions, out, rejects)}) < 3:
        raise ValueError(
            f"questions, out and rejects must be three files, got {[*map(str, (questions, out, rejects))]}"
        )
    return questions, out, rejects


def to_do(questions: Path, past: Past, limit: int | None) -> Iterator[Question]:
    """Return the first ``limit`` questions that are not done."""
    return islice((question for question in read_questions(questions) if question.id not in past.done), limit)
