"""Summarise a trace, or many, for an index or a table. A row is small enough to hold thousands in memory."""

from collections.abc import Iterable
from dataclasses import dataclass

from llava_cot.report.accounts import wasted
from llava_cot.report.view import read
from llava_cot.trace import Trace

RUNNING = "the search was still running"
LENGTH = 300  # the most characters kept of a question or an answer


@dataclass(frozen=True)
class Entry:
    """A trace among many. If it could not be read, ``error`` says why.

    ``gold`` is the right answer, if it is known, and ``href`` the relative file name of the trace's page.
    """

    trace: Trace | None
    gold: str | None = None
    href: str | None = None
    source: str = ""  # the file that it was read from, and the line in a .jsonl file
    error: str | None = None


@dataclass(frozen=True)
class Row:
    source: str
    href: str | None
    error: str | None  # why the trace could not be read; None if it was read
    failure: str | None = None  # why there is no answer
    gold: str | None = None
    question: str = ""
    answer: str = ""
    is_right: bool | None = None  # None: not known
    search: str = ""
    rounds: int = 0
    retraces: int = 0
    tokens: int = 0  # tokens drawn
    path: int = 0  # tokens of the returned answers
    seconds: float = 0.0
    malformed: str | None = None

    @property
    def wasted(self) -> float:
        return wasted(self.tokens, self.path)


@dataclass(frozen=True)
class Totals:
    """Totals over the traces that could be read. ``unread`` counts the others."""

    search: str
    traces: int
    unread: int
    failed: int  # searches without an answer
    known: int  # traces with a gold answer
    right: int
    retraced: int
    malformed: int
    tokens: int
    wasted: float
    seconds: float

    @property
    def accuracy(self) -> str:
        return f"{self.right / self.known:.1%} of {self.known:,}" if self.known else "–"


def summarise(entry: Entry) -> Row:
    """Return the row of a trace. The row of a trace that could not be read says why."""
    if entry.trace is None:
        return Row(entry.source, None, entry.error or "there is no trace")
    view = read(entry.trace)
    return Row(
        source=entry.source,
        href=entry.href,
        error=None,
        failure=RUNNING if view.is_running else None if view.failure is None else _cut(view.failure),
        gold=None if entry.gold is None else _cut(entry.gold),
        question=_cut(view.question),
        answer=_cut(view.answer),
        is_right=None if entry.gold is None else view.is_right(entry.gold),
        search=view.search,
        rounds=len(view.rounds),
        retraces=len(view.retraces),
        tokens=view.generated,
        path=view.path,
        seconds=view.seconds,
        malformed=None if view.malformed is None else _cut(view.malformed),
    )


def totals(search: str, rows: Iterable[Row]) -> Totals:
    """Return the totals of ``rows``. ``search`` is the name of the line that shows them."""
    rows = list(rows)
    good = [row for row in rows if row.error is None]
    tokens = sum(row.tokens for row in good)
    return Totals(
        search=search,
        traces=len(good),
        unread=len(rows) - len(good),
        failed=sum(row.failure is not None for row in good),
        known=sum(row.is_right is not None for row in good),
        right=sum(row.is_right is True for row in good),
        retraced=sum(row.retraces > 0 for row in good),
        malformed=sum(row.malformed is not None for row in good),
        tokens=tokens,
        wasted=wasted(tokens, sum(row.path for row in good)),
        seconds=sum(row.seconds for row in good),
    )


def _cut(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= LENGTH else f"{text[:LENGTH]}…"
