"""Show the progress of a training run."""

from collections.abc import Iterable, Mapping
from typing import Any

from rich import progress as bars
from rich.console import Console, RenderableType
from rich.text import Text

# The formats of values, in this order. Values with a slash, such as "loss/CAPTION", follow on a second line.
FORMATS = {
    "loss": "loss {:.4f}",
    "lr": "lr {:.2e}",
    "grad_norm": "grad norm {:.2f}",
    "tokens_per_s": "{:,.0f} tokens/s",
    "mfu": "MFU {:.1%}",
    "memory_gib": "{:.1f} GiB",
    "padding": "padding {:.1%}",
}


class Progress:
    """A bar with the step, the time left and the newest values on standard error. Only rank 0 shows it.

    If standard error is not a terminal, it prints a plain line every ``every`` steps and at the last one.

    Args:
        total: the last step of the run.
        start: the step that the run resumes from.
        every: the number of steps between plain lines.
        console: the console to print to; by default standard error.
    """

    def __init__(
        self, total: int, *, start: int = 0, rank: int = 0, every: int = 10, console: Console | None = None
    ) -> None:
        self._total, self._start, self._every = total, start, every
        self._on = rank == 0
        self._console = console or Console(stderr=True)
        self._values: dict[str, float] = {}
        self._bar = _Bar(
            bars.TextColumn("step"),
            bars.MofNCompleteColumn(),
            bars.BarColumn(),
            bars.TimeElapsedColumn(),
            bars.TextColumn("left"),
            bars.TimeRemainingColumn(),
            console=self._console,
            speed_estimate_period=300,
            disable=not (self._on and self._console.is_terminal),
        )
        self._task = self._bar.add_task("", total=total, completed=start)

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """Show that ``step`` is done. Values have names of ``FORMATS`` or with a slash, and stay until replaced."""
        if not self._on:
            return
        self._values.update(values)
        if self._console.is_terminal:
            self._bar.lines = [Text("  ".join(line)) for line in self._lines() if line]
            self._bar.update(self._task, completed=step)
        elif step % self._every == 0 or step == self._total:
            words = [word for line in self._lines() for word in line]
            self._console.print(f"step {step}/{self._total}", *words, f"left {self._left(step)}", soft_wrap=True)

    def _lines(self) -> Iterable[list[str]]:
        yield [form.format(self._values[name]) for name, form in FORMATS.items() if name in self._values]
        yield [f"{name} {value:.4f}" for name, value in self._values.items() if "/" in name]

    def _left(self, step: int) -> str:
        self._bar.update(self._task, completed=step)
        left = self._bar.tasks[0].time_remaining
        return "?" if left is None else f"{int(left) // 3600}:{int(left) // 60 % 60:02}:{int(left) % 60:02}"

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._bar.stop()


class _Bar(bars.Progress):
    lines: Iterable[RenderableType] = ()

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        yield from self.lines
