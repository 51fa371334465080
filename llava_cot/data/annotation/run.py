"""A run over a file of questions: resumed, bounded, stopped cleanly, and counted."""

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

from llava_cot.data.annotation.client import ChatClient
from llava_cot.data.annotation.cost import Estimate, Prices, Usage
from llava_cot.data.annotation.estimate import estimate_run
from llava_cot.data.annotation.journal import Journal
from llava_cot.data.annotation.past import Past, drop_stale, read_past
from llava_cot.data.annotation.questions import Question, read_questions
from llava_cot.data.annotation.record import Annotator

GRACE_SECONDS = 20.0  # for what is in flight when a signal comes


@dataclass(frozen=True)
class Settings:
    """How to annotate; the command line's options."""

    model: str
    base_url: str | None = None
    images: Path | None = None  # what image paths are relative to; by default the folder of the questions
    concurrency: int = 8  # conversations at a time
    rpm: float | None = None  # requests a minute
    tpm: float | None = None  # tokens a minute
    timeout: float = 120.0  # seconds, of one request
    max_retries: int = 8
    attempts: int = 2  # texts asked for a turn
    max_tokens: int = 2048  # of one reply
    temperature: float | None = None  # None: the endpoint's own
    seed: int | None = None
    image_tokens: int = 1000  # what an image counts for in estimates
    prices: Prices | None = None
    max_cost: float | None = None  # USD, of all runs into one file
    limit: int | None = None  # records of this run
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
        """What every request carries."""
        given = {"model": self.model, "max_completion_tokens": self.max_tokens}
        sampling = {"temperature": self.temperature, "seed": self.seed}
        return given | {name: value for name, value in sampling.items() if value is not None}


@dataclass
class Outcome:
    """What a run has done so far; ``usage`` is that of this run."""

    total: int  # that it was to do
    accepted: int = 0
    rejected: Counter[str] = field(default_factory=Counter)  # by kind
    usage: Usage = field(default_factory=Usage)
    cost: float | None = None  # USD, of this run
    stopped: str = ""  # why before the end
    signal: int | None = None  # that stopped it

    @property
    def done(self) -> int:
        return self.accepted + sum(self.rejected.values())


def annotate_file(
    questions: Path | str,
    out: Path | str,
    rejects: Path | str | None = None,
    settings: Settings | None = None,
    *,
    show: Callable[[Outcome], None] = lambda outcome: None,
    **options: Any,
) -> Outcome:
    """Annotate what ``out`` and ``rejects`` do not have yet; both are appended to, one record an id over all runs.

    SIGINT and SIGTERM let what is in flight end, for 20 s at most; a second one does not wait.

    Args:
        questions: see ``read_questions``; all is read and checked before anything is asked.
        rejects: ``OUT.rejects.jsonl`` by default.
        settings: or its fields by name.
        show: called after each record.

    Raises:
        ValueError: bad input or settings, a file of another kind or in use by another run, or an endpoint that refuses
            the key, the model or the account.
    """
    settings = settings or Settings(**options)
    questions, out, rejects = _paths(questions, out, rejects)
    client = ChatClient(
        settings.base_url,
        timeout=settings.timeout,
        max_retries=settings.max_retries,
        rpm=settings.rpm,
        tpm=settings.tpm,
        options=settings.options,
        image_tokens=settings.image_tokens,
    )
    for _ in read_questions(questions):
        pass
    accepted = Journal(out)
    try:
        rejected = Journal(rejects)
        try:
            drop_stale(out, rejected)  # a run that asked rejects again may have been killed
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
    """What ``annotate_file`` would still do and cost; asks nothing and writes nothing.

    Where ``out`` has records the figures are their means, else they come from the lengths of the texts.
    """
    settings = settings or Settings(**options)
    questions, out, rejects = _paths(questions, out, rejects)
    for _ in read_questions(questions):
        pass
    past = read_past(out, rejects, settings.retry_rejects)
    return estimate_run(to_do(questions, past, settings.limit), past, settings.image_tokens, settings.prices)


class _Run:
    """Workers that share one iterator of questions; all in one thread."""

    def __init__(
        self,
        settings: Settings,
        questions: Path,
        accepted: Journal,
        rejected: Journal,
        past: Past,
        client: ChatClient,
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
        is_main = threading.current_thread() is threading.main_thread()  # only that gets signals
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
        """The next question; None if there is none, or the money for it is not there."""
        most, outcome, prices = self._settings.max_cost, self._outcome, self._settings.prices
        if most is not None and prices is not None:
            each = self._cost_of_record if not outcome.done else (outcome.cost or 0.0) / outcome.done
            # Those in flight will cost what others did, so that the limit holds for the run's end.
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
    """The first ``limit`` questions that are not done."""
    return islice((question for question in read_questions(questions) if question.id not in past.done), limit)
