"""Show a run as one self-contained HTML page, and write its reports into its folder."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import quote

from llava_cot.atomic import replacing
from llava_cot.evaluate.folder import TRACES, trace_stem
from llava_cot.evaluate.pages.markdown import Cell, Section, flat, percent, sections, span, to_markdown
from llava_cot.evaluate.pages.plot import Point, plot
from llava_cot.evaluate.result import Result, Scored
from llava_cot.evaluate.statistics import wilson
from llava_cot.report import text
from llava_cot.report.index import table
from llava_cot.report.page import page
from llava_cot.stages import LLAVA_COT

PAGE, NOTES = "report.html", "report.md"
ROWS = 2_000  # the most answers on a page
BINS = 8  # of the plot
LENGTH = 300  # the most characters of a question, an answer or a gold answer in a row
TEXT = 20_000  # the most characters of what a model wrote
COLUMNS = {
    "": "number",
    "id": "text",
    "question": "text",
    "answer": "text",
    "extracted": "text",
    "gold": "text",
    "verdict": "text",
    "rule": "text",
    "category": "text",
    "tokens": "number",
    "retraces": "number",
}
MARKS = {"right": "✓ right", "wrong": "✗ wrong", "partly": "◐", "unparsed": "? unparsed", "failed": "✗ failed"}


def write_report(folder: Path, summary: Mapping[str, Any], scored: Sequence[Scored]) -> None:
    """Write ``report.md`` and ``report.html`` into the folder of a run.

    Answers are linked to their pages in ``traces/``, where there are some.
    """
    for name, content in ((NOTES, to_markdown(summary)), (PAGE, to_html(summary, scored, folder / TRACES))):
        with replacing(folder / name, "backslashreplace") as file:
            file.write(content)


def to_html(summary: Mapping[str, Any], scored: Sequence[Scored], traces: Path | None = None) -> str:
    """Return the page of a run.

    It has at most 2,000 answers: those that are not right first.

    Args:
        summary: what ``summarise`` returned for ``scored``.
        traces: the folder of trace pages. The page links to those that exist by their path from the folder above.
    """
    order = {id: at for at, id in enumerate(dict.fromkeys(each.question.id for each in scored))}
    shown = sorted(scored, key=lambda each: (kind(each.result) == "right", order[each.question.id], each.result.repeat))
    shown = sorted(shown[:ROWS], key=lambda each: (order[each.question.id], each.result.repeat))
    kinds = Counter(kind(each.result) for each in shown)
    lines = "".join(_row(number, each, traces) for number, each in enumerate(shown, 1))
    left_out = len(scored) - len(shown)
    note = f"{left_out:,} more answers, all of them right if there is room, are in results.jsonl alone."
    title = _title(summary)
    body = (
        f'<header class="top"><div><h1>{escape(title)}</h1>{_head(summary)}</div></header>\n'
        f'<div class="sections">{"".join(section_html(section) for section in sections(summary))}'
        f"{_plot(scored)}</div>\n<h2>Answers</h2>"
        f"{f'<p class=note>{note}</p>' if left_out > 0 else ''}"
        f"{table(COLUMNS, [name for name in MARKS if kinds[name]], lines, 'answers')}"
    )
    return page(title, body, ("page.css", "index.css", "run.css"), ("nav.js", "index.js"))


def kind(result: Result) -> str:
    """Return one of ``MARKS`` for a result."""
    if result.outcome == "failed":
        return "failed"
    if result.score is None:
        return "unparsed"
    return "right" if result.score >= 1 else "partly" if result.score > 0 else "wrong"


def token_points(scored: Iterable[Scored]) -> list[Point]:
    """Return the accuracy of up to eight equally large parts of the results, from the fewest tokens to the most."""
    found = sorted(
        (each.result.usage["generated_tokens"], each.result.score or 0.0)
        for each in scored
        if "generated_tokens" in each.result.usage
    )
    bounds = sorted({round(len(found) * at / BINS) for at in range(BINS + 1)})
    points = []
    for start, end in pairwise(bounds):
        tokens, scores = zip(*found[start:end])
        low, high = wilson(sum(scores), len(scores))
        mean, accuracy = sum(tokens) / len(tokens), sum(scores) / len(scores)
        title = f"{tokens[0]:,} to {tokens[-1]:,} tokens: {percent(accuracy)} of {len(scores):,} right"
        points.append(Point(mean, accuracy, low, high, title))
    return points


def _title(summary: Mapping[str, Any]) -> str:
    protocol = summary["protocol"]
    of = " · ".join(str(protocol[key]) for key in ("model", "search") if protocol.get(key))
    return f"{summary['title']} · {of}" if of else summary["title"]


def _head(summary: Mapping[str, Any]) -> str:
    low, high = summary["bounds"]
    facts = [
        (summary["headline"], "answer", f"{percent(summary['accuracy'])} <small>({span(summary['interval'])})</small>"),
        ("right", "", f"{summary['correct']:,g} of {summary['n']:,}"),
        ("bounds", "", f"{percent(low)} to {percent(high)}: if no answer without a verdict was right, or if all were"),
    ]
    without = [f"{summary[name]:,} {name}" for name in ("unparsed", "ungraded", "failed") if summary[name]]
    facts.append(("no verdict", "flaw" if without else "", ", ".join(without) or "none"))
    shown = "".join(f'<dt>{escape(name)}</dt><dd class="{style}">{html}</dd>' for name, style, html in facts)
    return f"<dl>{shown}</dl>"


def section_html(section: Section) -> str:
    """Return a table with its title as HTML."""
    lines = "".join(_line(section, row, at) for at, row in enumerate([section.columns, *section.rows]))
    return (
        f'<section class="{section.name}"><h2>{escape(section.title)}</h2><div class="wide"><table>{lines}</table>'
        "</div></section>"
    )


def _line(section: Section, row: Sequence[Cell], number: int) -> str:
    cells = []
    for at, cell in enumerate(row):
        tag = "td" if number and at else "th"
        style = ' class="left"' if at < section.left else ""
        cells.append(f"<{tag}{style}>{escape(cell)}</{tag}>")
    return f"<tr>{''.join(cells)}</tr>"


def _plot(scored: Sequence[Scored]) -> str:
    drawn = plot(token_points(scored), joined=True)
    if not drawn:
        return ""
    note = "Each point is an eighth of the answers, from the shortest to the longest, with Wilson's 95 % interval."
    return f'<section class="tokens"><h2>Accuracy by length</h2>{drawn}<p class="note">{note}</p></section>'


def _row(number: int, scored: Scored, traces: Path | None) -> str:
    question, result = scored.question, scored.result
    of = kind(result)
    mark = f"◐ {result.score:.2g}" if of == "partly" else MARKS[of]
    usage = result.usage
    cells = [
        f"<td>{_link(result, traces)}</td>",
        f"<td>{_question(scored)}</td>",
        f'<td class="flaw">{escape(cut(result.error or ""))}</td>' if of == "failed" else f"<td>{_answer(result)}</td>",
        f"<td>{escape(cut(result.extracted or ''))}</td>",
        f"<td>{escape(cut(question.answer))}</td>",
        f'<td class="verdict">{mark}</td>',
        f"<td>{escape(result.rule)}</td>",
        f"<td>{escape(' / '.join(question.category))}</td>",
        *(_number(usage.get(name)) for name in ("generated_tokens", "retraces")),
    ]
    return f'<tr class="{of}" tabindex="0"><td data-value="{number}">{number}</td>{"".join(cells)}</tr>\n'


def _link(result: Result, traces: Path | None) -> str:
    shown = result.id if not result.repeat else f"{result.id} · {result.repeat}"
    name = trace_stem(result.id, result.repeat)
    for suffix in (".html", ".json"):
        if traces is not None and (traces / f"{name}{suffix}").is_file():
            return f'<a href="{escape(quote(f"{traces.name}/{name}{suffix}"))}">{escape(cut(shown))}</a>'
    return escape(cut(shown))


def _question(scored: Scored) -> str:
    question = scored.question
    more = [question.text] if len(flat(question.text)) > LENGTH else []
    more += [f"{letter}. {choice}" for letter, choice in question.choices.items()]
    more += [f"Hint: {question.hint}"] if question.hint else []
    return folded(cut(question.text), text.to_html("\n".join(more)[:TEXT], fold=False) if more else "")


def _answer(result: Result) -> str:
    shown = cut(result.conclusion) or ("(no conclusion)" if result.text else "(empty)")
    written = result.text if len(result.text) <= TEXT else f"{result.text[:TEXT]}… {len(result.text) - TEXT:,} more"
    form = "" if result.outcome == "complete" else f'<p class="flaw">conclusion {escape(result.outcome)}</p>'
    return form + folded(shown, text.to_html(written, tags=LLAVA_COT.all_tags, fold=False) if written else "")


def folded(shown: str, more: str) -> str:
    """Return a text as HTML that unfolds to more HTML, if there is more."""
    return f"<details><summary>{escape(shown)}</summary>{more}</details>" if more else escape(shown)


def _number(value: float | None) -> str:
    return "<td></td>" if value is None else f'<td data-value="{value}">{value:,}</td>'


def cut(text: str) -> str:
    """Return a text on one line, with at most 300 characters."""
    text = flat(text)
    return text if len(text) <= LENGTH else f"{text[:LENGTH]}…"
