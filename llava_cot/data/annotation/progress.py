"""Show the progress of a run on stderr: records, tokens, cost and requests a second."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from llava_cot.data.annotation.cost import dollars
from llava_cot.data.annotation.run import Outcome


@contextmanager
def progress_bar() -> Iterator[Callable[[Outcome], None]]:
    """Yield a function that shows the outcome so far. The bar is shown until the block ends."""
    columns = BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn()
    started = time.monotonic()
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", visible=False)  # an error before the first request is shown without a bar

        def show(outcome: Outcome) -> None:
            seconds = max(time.monotonic() - started, 1e-9)
            usage, cost = outcome.usage, "" if outcome.cost is None else f" · {dollars(outcome.cost)}"
            described = (
                f"{sum(outcome.rejected.values())} rejected · {usage.prompt_tokens} + {usage.completion_tokens} tokens"
                f"{cost} · {usage.requests / seconds:.1f} requests/s"
            )
            bar.update(task, total=outcome.total, completed=outcome.done, description=described, visible=True)

        yield show


def summary(outcome: Outcome) -> str:
    """Summarise the run in one or two lines."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(outcome.rejected.items()))
    cost = "" if outcome.cost is None else f", {dollars(outcome.cost)}"
    usage = outcome.usage
    text = (
        f"{outcome.accepted} annotated, {sum(outcome.rejected.values())} rejected{f' ({kinds})' if kinds else ''}: "
        f"{usage.requests} requests, {usage.prompt_tokens} prompt and {usage.completion_tokens} completion tokens{cost}"
    )
    if outcome.stopped:
        left = outcome.total - outcome.done
        text += f"\nstopped by {outcome.stopped}; {left} left: run the same command to continue"
    return text
