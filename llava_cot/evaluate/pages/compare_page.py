"""Show the comparison of two runs: in Markdown, and as one self-contained HTML page."""

from collections.abc import Mapping
from html import escape
from typing import Any

from llava_cot.evaluate.pages.markdown import Section, flat, percent, span
from llava_cot.evaluate.pages.markdown import escape as escape_markdown
from llava_cot.evaluate.pages.markdown import table as markdown_table
from llava_cot.evaluate.pages.report import cut, folded, section_html
from llava_cot.report import text
from llava_cot.report.index import table
from llava_cot.report.numbers import count
from llava_cot.report.page import page
from llava_cot.stages import LLAVA_COT

ROWS = 2_000
COLUMNS = {"": "number", "id": "text", "question": "text", "gold": "text", "A": "text", "B": "text", "better": "text"}
FILTERS = "only-a", "only-b"


def sections(found: Mapping[str, Any]) -> list[Section]:
    """Return the tables of a comparison, as ``compare_runs`` returns it."""
    a, b, difference = found["a"], found["b"], found["difference"]
    runs = [
        [
            name,
            side["path"],
            percent(side["accuracy"]),
            span(side["interval"]),
            *(str(side[key]) for key in ("unparsed", "failed")),
            "" if side["tokens"] is None else f"{side['tokens']:,.1f}",
        ]
        for name, side in (("A", a), ("B", b))
    ]
    value = difference["value"]
    low, high = difference["interval"]
    tests = [
        ["B - A", "–" if value is None else f"{100 * value:+.1f} points"],
        ["95 % interval, paired bootstrap", f"{100 * low:+.1f} to {100 * high:+.1f} points"],
        ["resampled", f"{found['groups']:,} groups of {found['n']:,} questions"],
    ]
    if pairs := found["pairs"]:
        tests += [
            [f"{pairs['of']} only A has right", f"{pairs['only_a']:,}"],
            [f"{pairs['of']} only B has right", f"{pairs['only_b']:,}"],
            ["both, neither", f"{pairs['both']:,}, {pairs['neither']:,}"],
            ["McNemar's exact test, p", f"{pairs['mcnemar']:.2g}"],
        ]
    else:
        tests.append(["McNemar's exact test", "not for runs with repeats or grades"])
    differs = [[row["name"], row["a"] or "", row["b"] or ""] for row in found["differs"]]
    columns = "run", "folder", found["headline"], "95 % interval", "unparsed", "failed", "tokens per answer"
    shown = [
        Section("runs", "Runs", columns, runs, left=2),
        Section("tests", "Difference", ("", "value"), tests),
        Section("differs", "What differs in the protocols", ("", "A", "B"), differs, left=3),
    ]
    return [section for section in shown if section.rows]


def to_text(found: Mapping[str, Any]) -> str:
    """Return the comparison in Markdown: its tables, and the ids with another score."""
    parts = [f"# {escape_markdown(found['title'])}"]
    for section in sections(found):
        parts += [f"## {section.title}", markdown_table(section.columns, section.rows)]
    for name, better, worse in (("A", "a", "b"), ("B", "b", "a")):
        ids = [flip["id"] for flip in found["flips"] if flip[better]["score"] > flip[worse]["score"]]
        parts += [f"## {count(len(ids), 'question')} that {name} answers better"]
        parts += [", ".join(map(escape_markdown, ids))] if ids else []
    return "\n\n".join(parts) + "\n"


def to_html(found: Mapping[str, Any]) -> str:
    """Return the page of a comparison, with the questions that the two runs answered differently well."""
    shown = found["flips"][:ROWS]
    lines = "".join(_row(number, flip) for number, flip in enumerate(shown, 1))
    title = f"{found['title']}: {flat(found['a']['path'])} against {flat(found['b']['path'])}"
    more = len(found["flips"]) - len(shown)
    body = (
        f'<header class="top"><div><h1>{escape(title)}</h1></div></header>\n'
        f'<div class="sections">{"".join(section_html(section) for section in sections(found))}</div>\n'
        f"<h2>Questions with another score</h2>"
        f"{f'<p class=note>{more:,} more are not shown.</p>' if more else ''}"
        f"{table(COLUMNS, FILTERS, lines, 'answers')}"
    )
    return page(title, body, ("page.css", "index.css", "run.css"), ("nav.js", "index.js"))


def _row(number: int, flip: Mapping[str, Any]) -> str:
    better = "only-a" if flip["a"]["score"] > flip["b"]["score"] else "only-b"
    name = {"only-a": "A", "only-b": "B"}[better]
    scores = f"{flip['a']['score']:.2g} : {flip['b']['score']:.2g}"
    cells = [
        f"<td>{escape(cut(flip['id']))}</td>",
        f"<td>{escape(cut(flip['question']))}</td>",
        f"<td>{escape(cut(flip['gold']))}</td>",
        *(f"<td>{_answer(flip[side])}</td>" for side in ("a", "b")),
        f'<td class="verdict">{name} ({scores})</td>',
    ]
    return f'<tr class="{better}" tabindex="0"><td data-value="{number}">{number}</td>{"".join(cells)}</tr>\n'


def _answer(side: Mapping[str, Any]) -> str:
    more = text.to_html(side["text"], tags=LLAVA_COT.all_tags, fold=False) if side["text"] else ""
    return folded(cut(side["answer"]) or "(no conclusion)", more)
