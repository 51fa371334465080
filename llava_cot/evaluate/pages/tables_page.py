"""Show the tables of the paper in Markdown, and as one self-contained HTML page with plots."""

from collections.abc import Mapping
from html import escape
from typing import Any

from llava_cot.evaluate.pages import markdown
from llava_cot.evaluate.pages.markdown import Section
from llava_cot.evaluate.pages.plot import Point, plot
from llava_cot.evaluate.pages.report import section_html
from llava_cot.report.page import page

TITLE = "Evaluation"


def sections(found: Mapping[str, Any]) -> list[Section]:
    """Return the tables of ``make_tables``."""
    titles = [column["title"] for column in found["columns"]]
    has_mean = len(titles) > 1
    has_tokens = any(row["tokens"] is not None for table in found["tables"] for row in table["rows"])
    columns = ["model", "search", *titles, *["mean"][:has_mean], *["tokens per answer"][:has_tokens], "source"]
    made = []
    for table in found["tables"]:
        rows = []
        for row in table["rows"]:
            source = row["source"]
            mean = "" if row["mean"] is None else f"{100 * row['mean'] + 1e-9:.1f}"  # as the paper rounds 60.85
            tokens = "" if row["tokens"] is None else f"{row['tokens']:,.0f}"
            rows.append([
                row["model"],
                row["search"],
                *map(_cell, row["cells"]),
                *[mean][:has_mean],
                *[tokens][:has_tokens],
                "this run" if source is None else f"{source['name']} [{source['note']}]",
            ])  # fmt: skip
        made.append(Section(f"paper {table['name']}", table["title"], columns, rows, left=2))
    return made


def to_markdown(found: Mapping[str, Any]) -> str:
    """Return the tables with their notes in Markdown. Accuracies are percentages."""
    parts = []
    for section in sections(found):
        parts += [f"## {section.title}", markdown.table(section.columns, section.rows)]
    notes = [f"{number}. {markdown.escape(note)}" for number, note in enumerate(found["notes"], 1)]
    return "\n\n".join([*parts, *(["Notes:", "\n".join(notes)] if notes else [])]) + "\n"


def to_html(found: Mapping[str, Any]) -> str:
    """Return the page of the tables, with a plot of accuracy against tokens for each benchmark."""
    plots = "".join(_plot(found, at, column["title"]) for at, column in enumerate(found["columns"]))
    notes = "".join(f"<li>{escape(note)}</li>" for note in found["notes"])
    body = (
        f'<header class="top"><div><h1>{TITLE}</h1><p class="note">Accuracies are percentages. A number in brackets '
        f'names a note.</p></div></header>\n<main class="sections">{"".join(map(section_html, sections(found)))}{plots}'
        f'<section class="notes"><h2>Notes</h2><ol>{notes}</ol></section></main>\n'
    )
    return page(TITLE, body, ("page.css", "run.css"), ())


def _cell(cell: Mapping[str, Any] | None) -> str:
    if cell is None or cell["value"] is None:
        return ""
    text = f"{100 * cell['value']:.1f}"
    if cell["interval"] is not None:
        low, high = cell["interval"]
        text += f" ({100 * low:.1f} to {100 * high:.1f})"
    elif cell["notes"]:
        text += " †"
    return text + "".join(f" [{note}]" for note in cell["notes"])


def _plot(found: Mapping[str, Any], at: int, title: str) -> str:
    points, names = [], []
    for row in next((table["rows"] for table in found["tables"] if table["name"] == "main"), []):
        cell = row["cells"][at]
        if row["source"] is None and cell is not None and cell["tokens"] is not None and cell["value"] is not None:
            names.append(f"{row['model']}, {row['search']}")
            shown = f"{names[-1]}: {100 * cell['value']:.1f} at {cell['tokens']:,.0f} tokens"
            low, high = cell["interval"]
            points.append(Point(cell["tokens"], cell["value"], low, high, shown, str(len(names))))
    drawn = plot(points)
    legend = "".join(f"<li>{escape(name)}</li>" for name in names)
    return f'<section class="tokens"><h2>{escape(title)}</h2>{drawn}<ol>{legend}</ol></section>' if drawn else ""
