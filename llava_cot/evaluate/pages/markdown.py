"""Show the summary of a run as tables: in Markdown, and as the sections that the page has too."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Cell = str

# A bracket is markup only where a link goes on behind it, and "_" only at the edge of a word.
_MARKUP = re.compile(r"[\\`*<>|&]|(?<!\w)_|_(?!\w)|\](?=[(:\[])")


@dataclass(frozen=True)
class Section:
    """A table with a title.

    Attributes:
        name: what it is to a style sheet.
        left: how many columns, from the first on, are aligned to the left.
    """

    name: str
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    left: int = 1


def to_markdown(summary: Mapping[str, Any]) -> str:
    """Return the summary of a run, as ``summarise`` returns it, in Markdown."""
    low, high = summary["bounds"]
    without = ", ".join(f"{summary[name]:,} {name}" for name in ("unparsed", "ungraded", "failed"))
    parts = [
        f"# {escape(summary['title'])}",
        f"**{escape(summary['headline'])}: {percent(summary['accuracy'])}** ({span(summary['interval'])}), "
        f"{summary['correct']:,g} of {summary['n']:,} right.",
        f"Bounds: {percent(low)} if no answer without a verdict was right, {percent(high)} if all were ({without}).",
    ]
    for section in sections(summary):
        parts += [f"## {section.title}", table(section.columns, section.rows)]
    return "\n\n".join(parts) + "\n"


def sections(summary: Mapping[str, Any]) -> list[Section]:
    """Return the tables of a summary that have something to show."""
    metrics = [
        [name, percent(metric["value"]), span(metric["interval"]), _count(metric["n"])]
        for name, metric in summary["metrics"].items()
    ]
    categories = [
        [" / ".join(row["category"]), percent(row["accuracy"]), span(row["interval"]), _count(row["n"])]
        for row in summary["categories"]
    ]
    repeats = [
        [f"{name}@{k}", percent(metric["value"]), span(metric["interval"]), _count(metric["n"])]
        for name, metrics in (("pass", summary["pass_at_k"]), ("majority", summary["majority_at_k"]))
        for k, metric in metrics.items()
    ]
    of = max(1, summary["results"])
    outcomes = [[name, f"{count:,}", percent(count / of)] for name, count in summary["outcomes"].items()]
    usage = [
        [name.replace("_", " "), f"{costs['mean']:,.1f}", f"{costs['total']:,.0f}"]
        for name, costs in summary["usage"].items()
    ]
    rules = [[rule, f"{count:,}", percent(count / of)] for rule, count in summary["rules"].items()]
    shares = "accuracy", "95 % interval", "of"
    found = [
        Section("protocol", "Protocol", ("", "value"), protocol_rows(summary["protocol"]), left=2),
        Section("metrics", "Metrics", ("metric", *shares), metrics),
        Section("repeats", f"Over {summary['repeats']} repeats", ("metric", *shares), repeats),
        Section("outcomes", "How conclusions were written", ("conclusion", "answers", "share"), outcomes),
        Section("rules", "How verdicts were found", ("rule", "answers", "share"), rules),
        Section("usage", "Cost of an answer", ("", "mean", "total"), usage),
        Section("categories", "Categories", ("category", *shares), categories),
    ]
    return [section for section in found if section.rows]


def protocol_rows(protocol: Mapping[str, Any]) -> list[list[Cell]]:
    """Return the protocol as rows of a name and a value. What is nested has names with dots."""
    rows = []
    for name, value in protocol.items():
        if isinstance(value, Mapping):
            rows += [[f"{name}.{part}", shown] for part, shown in protocol_rows(value)]
        elif value not in (None, "", [], ()):
            rows.append([name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)])
    return rows


def table(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """Return a table in Markdown. Cells are any text."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(
        "| " + " | ".join(cell if at == 1 else escape(cell) for cell in line) + " |" for at, line in enumerate(lines)
    )


def escape(text: str) -> str:
    """Return any text as it stands in Markdown: on one line, and never as markup or HTML."""
    return _MARKUP.sub(r"\\\g<0>", flat(text))


def flat(text: str) -> str:
    """Return a text on one line."""
    return " ".join(text.split())


def percent(value: float | None) -> str:
    """Return a fraction as a percentage with one decimal."""
    return "–" if value is None else f"{value:.1%}"


def span(interval: Sequence[float]) -> str:
    """Return an interval of fractions as percentages."""
    low, high = interval
    return f"{percent(low)} to {percent(high)}"


def _count(n: float | None) -> str:
    return "" if n is None else f"{n:,g}"
