"""Show many traces: a page for each with an index, or a table in the terminal."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from rich.table import Table
from rich.text import Text

from llava_cot.atomic import check_output_folder, replacing
from llava_cot.report.html import to_html
from llava_cot.report.index import index_page
from llava_cot.report.summary import Entry, Row, Totals, summarise, totals
from llava_cot.report.tree import one_line
from llava_cot.trace import TraceError, scan_traces


def read_rows(path: Path) -> list[Row]:
    """Return a row for each trace of a folder or a .jsonl file. One trace is in memory at a time.

    Raises:
        ValueError: there is no trace that can be read.
    """
    return _checked(path, [summarise(entry) for entry in _entries(path)])


def write_pages(path: Path, folder: Path) -> list[Row]:
    """Write a page for each trace into ``folder``, with an index.html that links to them. Returns the rows.

    Raises:
        ValueError: there is no trace that can be read, or ``folder`` is a file or may not be written.
    """
    check_output_folder(folder, "html")
    folder.mkdir(parents=True, exist_ok=True)
    rows = _checked(path, [_write_page(entry, folder, n) for n, entry in enumerate(_entries(path), 1)])
    with replacing(folder / "index.html") as file:
        file.write(index_page(rows, path.name))
    return rows


def to_table(rows: list[Row]) -> Table:
    """Return a table with one line for each search, and one for all if there are several."""
    searches = sorted({row.search for row in rows if row.error is None})
    lines = [totals(search, [row for row in rows if row.search == search and row.error is None]) for search in searches]
    table = Table(box=None, padding=(0, 1, 0, 0))  # narrow enough for 80 columns
    for name in ("search", "traces", "accuracy", "retraced", "malformed", "tokens", "wasted", "seconds"):
        table.add_column(name, justify="left" if name == "search" else "right")
    for line in [*lines, *([totals("all", rows)] if len(lines) > 1 else [])]:
        table.add_row(*_cells(line))
    return table


def _entries(path: Path) -> Iterator[Entry]:
    for found in scan_traces(path):
        if isinstance(found, TraceError):
            yield Entry(None, source=found.source, error=found.detail)
        else:
            yield Entry(found.trace, found.gold, source=found.source)


def _write_page(entry: Entry, folder: Path, number: int) -> Row:
    name = f"{number:05}.html"
    row = summarise(replace(entry, href=name))
    if entry.trace is not None:
        with replacing(folder / name) as file:
            file.write(to_html(entry.trace, gold=entry.gold))
    return row


def _checked(path: Path, rows: list[Row]) -> list[Row]:
    if not rows:
        raise ValueError(f"{str(path)!r} must hold traces as .json or .jsonl, got none")
    if all(row.error is not None for row in rows):
        raise ValueError(
            f"{str(path)!r} must hold a trace that can be read, got {len(rows)} that can't; "
            f"the first is {rows[0].source}: {rows[0].error}"
        )
    return rows


def _cells(line: Totals) -> list[Text]:
    parts = (
        one_line(line.search),
        f"{line.traces:,}",
        line.accuracy,
        f"{line.retraced:,}",
        f"{line.malformed:,}",
        f"{line.tokens:,}",
        f"{line.wasted:.0%}",
        f"{line.seconds:,.1f}",
    )
    return [Text(part) for part in parts]
