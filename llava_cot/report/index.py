"""Show many traces as one HTML page that loads nothing: a table to filter and sort, with a link to each page."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from urllib.parse import quote

from llava_cot.report.page import page
from llava_cot.report.summary import Entry, Row, summarise, totals

# Columns of numbers are sorted from the largest, columns of text alphabetically.
COLUMNS = {
    "": "number",
    "question": "text",
    "answer": "text",
    "gold": "text",
    "right": "text",
    "search": "text",
    "rounds": "number",
    "retraces": "number",
    "tokens": "number",
    "wasted": "number",
    "seconds": "number",
    "malformed": "text",
}
FILTERS = "wrong", "retraced", "malformed", "failed"  # classes of rows


def to_index(entries: Iterable[Entry], title: str = "Traces") -> str:
    """Return the index page of all ``entries``. Only the row of each entry is held in memory."""
    return index_page([summarise(entry) for entry in entries], title)


def index_page(rows: list[Row], title: str) -> str:
    lines = "".join(_row(number, row) for number, row in enumerate(rows, 1))
    body = (
        f'<header class="top"><div><h1>{escape(title)}</h1><p>{escape(_totals(rows))}</p></div></header>\n'
        f"{table(COLUMNS, FILTERS, lines, 'traces')}"
    )
    return page(title, body, ("page.css", "index.css"), ("nav.js", "index.js"))


def table(columns: Mapping[str, str], filters: Sequence[str], lines: str, name: str) -> str:
    """Return the table of a page that ``index.js`` filters and sorts.

    Args:
        columns: the kind of each, "number" or "text", by its name. The first has none and is a row's number.
        filters: the classes of rows that have a filter.
        lines: the rows, as HTML.
        name: another class of the table, for its style.
    """
    head = "".join(f'<th data-kind="{kind}"><button>{title or "#"}</button></th>' for title, kind in columns.items())
    return (
        f'<main class="wide"><table class="index {name}" data-filters="{" ".join(filters)}"><thead><tr>{head}</tr>'
        f"</thead><tbody>\n{lines}</tbody></table></main>\n"
    )


def _totals(rows: list[Row]) -> str:
    all = totals("all", rows)
    facts = [
        f"{all.traces:,} traces" if all.traces != 1 else "1 trace",
        *([f"{all.accuracy} right"] if all.known else []),
        f"{all.retraced:,} retraced",
        f"{all.malformed:,} malformed",
        *([f"{all.failed:,} failed"] if all.failed else []),
        *([f"{all.unread:,} could not be read"] if all.unread else []),
        f"{all.tokens:,} tokens drawn, {all.wasted:.0%} wasted",
        f"{all.seconds:,.1f} s",
    ]
    return " · ".join(facts)


def _row(number: int, row: Row) -> str:
    """Return a row as HTML. Cells carry numbers for the script that sorts, and its classes are the names of filters."""
    if row.error is not None:
        note = escape(f"{row.source}: {row.error}" if row.source else row.error)
        return (
            f'<tr class="failed" tabindex="0"><td data-value="{number}">{number}</td>'
            f'<td class="flaw" colspan="{len(COLUMNS) - 1}">✗ failed: {note}</td></tr>\n'
        )
    verdict = {True: "✓ right", False: "✗ wrong", None: ""}[row.is_right]
    kinds = [
        *(["wrong"] if row.is_right is False else ["right"] if row.is_right else []),
        *(["retraced"] if row.retraces else []),
        *(["malformed"] if row.malformed else []),
        *(["failed"] if row.failure else []),
    ]
    question = escape(row.question or row.source or "A search")
    if row.href is not None:
        question = f'<a href="{escape(quote(row.href, errors="replace"))}">{question}</a>'
    cells = [
        f"<td>{question}</td>",
        f'<td class="flaw">✗ failed: {escape(row.failure)}</td>' if row.failure else f"<td>{escape(row.answer)}</td>",
        f"<td>{escape(row.gold or '')}</td>",
        f'<td class="verdict">{verdict}</td>',
        f"<td>{escape(row.search)}</td>",
        *(f'<td data-value="{value}">{value:,}</td>' for value in (row.rounds, row.retraces, row.tokens)),
        f'<td data-value="{row.wasted:.6f}">{row.wasted:.0%}</td>',
        f'<td data-value="{row.seconds:.6f}">{row.seconds:.2f}</td>',
        f'<td class="flaw">{escape(row.malformed or "")}</td>',
    ]
    return f'<tr class="{" ".join(kinds)}" tabindex="0"><td data-value="{number}">{number}</td>{"".join(cells)}</tr>\n'
