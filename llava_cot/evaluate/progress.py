"""Show on stderr how a run goes: what is done, how much is right so far, and how long the rest takes."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from llava_cot.evaluate.result import Result
from llava_cot.evaluate.statistics import wilson

SECONDS_PER_LINE = 30.0  # where there is no terminal


@dataclass
class Counts:
    """The results of this run so far."""

    done: int = 0
    right: float = 0.0
    unparsed: int = 0
    failed: int = 0
    malformed: int = 0  # answers whose conclusion is not complete
    retraced: int = 0  # questions with a retrace
    tokens: int = 0

    def add(self, result: Result) -> None:
        self.done += 1
        self.right += result.score or 0.0
        self.failed += result.outcome == "failed"
        self.unparsed += result.score is None and result.outcome != "failed"
        self.malformed += result.outcome not in ("complete", "failed")
        self.retraced += result.usage.get("retraces", 0) > 0
        self.tokens += result.usage.get("generated_tokens", 0)

    def line(self, seconds: float) -> str:
        """One line in plain words."""
        low, high = wilson(self.right, self.done)
        share = 100 / max(self.done, 1)
        parts = [f"{self.right * share:.1f} % right ({100 * low:.0f} to {100 * high:.0f})"]
        counts = (("unparsed", self.unparsed), ("failed", self.failed))
        parts += [f"{count} {name}" for name, count in counts if count]
        shares = (("not in the format", self.malformed), ("retraced", self.retraced))
        parts += [f"{count * share:.0f} % {name}" for name, count in shares if count]
        return " · ".join([*parts, f"{self.tokens / max(seconds, 1e-9):.0f} tokens/s"])


@contextmanager
def shown(total: int) -> Iterator[Callable[[Result], None]]:
    """Yield a function to call with each result. A terminal shows a bar, anything else a line now and then."""
    counts, started = Counts(), time.monotonic()
    if not sys.stderr.isatty():
        last = started

        def tell(result: Result) -> None:
            nonlocal last
            counts.add(result)
            now = time.monotonic()
            if now - last >= SECONDS_PER_LINE or counts.done == total:
                last = now
                left = (now - started) / counts.done * (total - counts.done)
                print(
                    f"{counts.done} of {total} · {counts.line(now - started)} · {left / 60:.0f} min left",
                    file=sys.stderr,
                )

        yield tell
        return
    columns = BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total)

        def show(result: Result) -> None:
            counts.add(result)
            bar.update(task, completed=counts.done, description=counts.line(time.monotonic() - started))

        yield show
