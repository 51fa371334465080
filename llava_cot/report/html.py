"""Show a trace as one HTML page that loads nothing. Stages are columns, rounds are rows, retraces are arrows."""

from html import escape
from io import BytesIO
from itertools import groupby
from types import NoneType
from typing import TYPE_CHECKING

from llava_cot.core import check_kind
from llava_cot.report import text
from llava_cot.report.accounts import OUTSIDE
from llava_cot.report.card import Card
from llava_cot.report.decisions import Retrace
from llava_cot.report.numbers import count, number
from llava_cot.report.page import clean, page
from llava_cot.report.svg import arrow, strip
from llava_cot.report.view import View, read
from llava_cot.trace import Trace

if TYPE_CHECKING:
    from PIL.Image import Image

    from llava_cot.image import Images

IMAGE_SIDE = 512  # the most pixels of a side
IMAGE_BYTES = 200_000  # a larger PNG becomes a JPEG, to keep the page small
NOTE_LENGTH = 400  # the most characters shown of an error or of a violation of the grammar


def to_html(
    trace: Trace,
    *,
    image: "Images" = None,
    question: str | None = None,
    gold: str | None = None,
) -> str:
    """Return the page of a trace. The same arguments give the same bytes.

    Args:
        image: what the question is about, as ``answer`` takes it, shown with at most 512 pixels a side.
        question: the question; by default that of the trace.
        gold: the right answer, if it is known.
    """
    check_kind("question", question, (str, NoneType), "a string or None")
    check_kind("gold", gold, (str, NoneType), "a string or None")
    view = read(trace)
    question = view.question if question is None else question
    body = _body(view, image, question, gold)
    return page(question or "A search", body, ("page.css", "trace.css"), ("nav.js", "trace.js"))


def to_fragment(trace: Trace, *, image: "Images" = None, question: str | None = None, gold: str | None = None) -> str:
    """Return the body of the page that ``to_html`` returns: header, accounts and board.

    It is for a page that has ``page.css`` and ``trace.css`` itself. The trace may be that of a search that still runs.
    """
    view = read(trace)
    return clean(_body(view, image, view.question if question is None else question, gold))


def to_frame(trace: Trace) -> str:
    """Return the page in a frame, which keeps its style and its script out of a notebook."""
    page = escape(to_html(trace))
    return f'<iframe srcdoc="{page}" sandbox="allow-scripts" style="width: 100%; height: 40em; border: 0"></iframe>'


def _body(view: View, image: "Images", question: str, gold: str | None) -> str:
    return _header(view, image, question, gold) + _accounts(view) + _board(view)


def _header(view: View, image: "Images", question: str, gold: str | None) -> str:
    picture = "" if image is None else _pictures(image)
    facts = [("answer", "answer", text.to_html(view.answer, tags=view.tags))]
    if view.is_running:
        facts = [("running", "running", "there is no answer yet")]
    if view.failure is not None:
        facts = [("failed", "flaw", f"✗ {escape(_cut(view.failure))}")]
    if gold is not None:
        verdict = "✓ the same" if view.is_right(gold) else "≠ not the same"
        facts.append(("gold", "gold", f"{escape(gold)} {verdict if view.has_answer else ''}"))
    if view.malformed:
        facts.append(("form", "flaw", f"✗ malformed: {escape(view.malformed)}"))
    for card, answer in view.others:
        note = f'<span class="note">{_link(card)}, score {number(card.score)}</span>'
        facts.append((card.returned, "other", f"{text.to_html(answer, tags=view.tags)} {note}"))
    numbers = (view.cards, "candidate"), (view.rounds, "round"), (view.retraces, "retrace")
    settings = " · ".join((view.search, f"seed {view.seed}", *(count(len(of), noun) for of, noun in numbers)))
    facts.append(("search", "", escape(settings)))
    if view.spent:
        facts.append(("budget", "flaw", escape(view.spent)))
    shown = "".join(f'<dt>{name}</dt><dd class="{kind}">{html}</dd>' for name, kind, html in facts)
    return (
        f'<header class="top">{picture}<div><h1>{escape(question or "A search")}</h1><dl>{shown}</dl></div></header>\n'
    )


def _pictures(image: "Images") -> str:
    from llava_cot.image import images_of, open_image  # not before, since a report without a picture can spare them

    urls = (_data_url(open_image(each)) for each in images_of(image))
    return "".join(f'<img src="{url}" alt="the image asked about">' for url in urls)


def _data_url(small: "Image") -> str:
    from llava_cot.image import data_uri

    small.thumbnail((IMAGE_SIDE, IMAGE_SIDE))
    for kind in ("png", "jpeg"):
        file = BytesIO()
        small.save(file, kind)
        if len(file.getvalue()) <= IMAGE_BYTES:
            break
    return data_uri(file.getvalue(), kind)


def _accounts(view: View) -> str:
    rows = [
        (
            escape(account.name),
            account.candidates or "",
            f"{account.tokens:,}",
            *_use(view, account.path, account.wasted),
            f"{account.drawing:.2f}",
            f"{account.scoring:.2f}",
        )
        for account in view.accounts
    ]
    drawing, scoring = (sum(getattr(a, name) for a in view.accounts) for name in ("drawing", "scoring"))
    totals = f"{view.generated:,}", *_use(view, view.path, view.wasted), f"{drawing:.2f}", f"{scoring:.2f}"
    rows.append(("all", len(view.cards), *totals))
    which = "answers" if view.others else "answer"
    outside = f"<p class=note>{OUTSIDE}: what a scorer let the model write, dropped beams, tokens taken back</p>"
    names = "", "candidates", "tokens drawn", f"in the {which}", "wasted", "seconds drawing", "seconds scoring"
    head = "".join(f"<th>{name}</th>" for name in names)
    lines = "".join(f"<tr><th>{row[0]}</th>{''.join(f'<td>{cell}</td>' for cell in row[1:])}</tr>" for row in rows)
    return (
        f'<section class="accounts"><p>{_summary(view, which)}</p>'
        f'<div class="wide"><table><tr>{head}</tr>{lines}</table></div>'
        f"{outside if view.accounts and view.accounts[-1].name == OUTSIDE else ''}"
        f'<p class="note">{", ".join(view.usage)}</p></section>\n'
    )


def _use(view: View, path: int, wasted: float) -> tuple[str, str]:
    """Return the cells for the tokens in the answer and for the wasted share, which are not known before the end."""
    return ("–", "–") if view.is_running else (f"{path:,}", f"{wasted:.0%}")


def _summary(view: View, which: str) -> str:
    if view.is_running:
        return f"<b>{count(view.generated, 'token')} drawn so far</b>"
    wasted = f"{max(0, view.generated - view.path):,} of {view.generated:,}"
    return f"<b>{view.wasted:.0%} of the drawn tokens are wasted</b>: {wasted} are not in the {which}."


def _board(view: View) -> str:
    columns = max(1, len(view.headings))
    rows = {round: row for row, round in enumerate(view.rounds)}
    parts = []
    for column, heading in enumerate(view.headings):
        cards = [card for card in view.cards.values() if card.column == column]
        cutoffs = {pool.cutoff for (_, of), pool in view.pools.items() if of == column and pool.cutoff is not None}
        parts.append(f'<section class="head"><h2>{escape(heading)}</h2>{strip(cards, sorted(cutoffs), rows)}</section>')
    for round in view.rounds:
        parts.append(f'<h3 class="round" data-round="{round}">round {round}</h3>')
        parts += [_cell(view, round, column) for column in range(len(view.headings))]
        parts += [_retrace(view, retrace) for retrace in view.after(round)]
    if view.spent:
        parts.append(
            f'<p class="spent" data-round="{view.rounds[-1] if view.rounds else 1}">■ {escape(view.spent)}</p>'
        )
    more = view.is_running and any(card.stage for card in view.cards.values())  # columns of other stages will come
    kind = "board only" if columns == 1 and not more else "board"
    return f'<main class="wide"><div class="{kind}" style="--columns: {columns}">{"".join(parts)}</div></main>\n'


def _cell(view: View, round: int, column: int) -> str:
    cards, pool = view.cells.get((round, column), []), view.pools.get((round, column))
    parts = [f'<p class="note">{escape(pool.verdict)}</p>'] if pool and pool.verdict else []
    if pool and pool.carried:
        rounds = groupby(sorted(pool.carried, key=lambda card: card.round), lambda card: card.round)
        links = "; ".join(
            f"round {drawn}: " + ", ".join(f"{_link(card)} {number(card.score)}" for card in cards)
            for drawn, cards in rounds
        )
        parts.append(f'<p class="note">⤴ carried over into this pool from {links}</p>')
    parts += [_card(view, card) for card in cards]
    return f'<section class="cell" data-round="{round}">{"".join(parts)}</section>'


def _card(view: View, card: Card) -> str:
    kept = _kept_sibling(view, card)
    stage, kinds = view.stage_of(card), f"{card.state} returned" if card.returned else card.state
    badges = f' <b class="stage">{escape(stage)}</b>' if stage else ""
    badges += f' <b class="answer-badge">{card.returned}</b>' if card.returned else ""
    badges += "" if card.closed else ' <b class="flaw">✗ unclosed</b>'
    flaws = f'<p class="flaw">✗ {escape(_cut(card.violation))}</p>' if card.violation else ""
    flaws += f'<p class="flaw">⚠ no score: {escape(_cut(card.error))}</p>' if card.error else ""
    notes = " · ".join(f"{escape(name)} {number(value)}" for name, value in card.notes.items())
    return (
        f'<article class="card {kinds}" id="n{card.id}" tabindex="0" data-round="{card.round}" '
        f'data-state="{card.state}" data-parent="n{card.parent}"><header><span class="id">#{card.id}</span> '
        f'<b class="state">{card.label}</b>{badges}<span class="score">{number(card.score)}</span></header>'
        f"{flaws}{text.to_html(card.text, kept.text if kept else None, view.tags)}"
        f"{f'<p class=facts>scores: {notes}</p>' if notes else ''}"
        f'<p class="facts">{" · ".join(_facts(view, card, kept))}</p></article>'
    )


def _facts(view: View, card: Card, kept: Card | None) -> list[str]:
    """Return the facts at the foot of a card, as HTML."""
    into = [r for (r, _), pool in view.pools.items() if any(card is member for member in pool.carried)]
    sampled = f" ({number(card.sampling_logprob)} as sampled)" if card.sampling_logprob is not None else ""
    facts = [
        count(card.tokens, "token"),
        f"mean log-prob {number(card.logprob)}{sampled}",
        f"ended by {escape(card.finish)}",
        f"{card.seconds:.2f} s",
        *([f"seed {card.seed}"] if card.seed else []),  # a token beam has no seed
    ]
    facts += [f"under {_link(view.cards[card.parent])}"] if card.parent in view.cards else []
    facts += [f"⤴ also in the pool of round {', '.join(map(str, into))}"] if into else []
    if kept:
        note = "the same text as" if card.text == kept.text else "<mark>marked</mark>: not in"
        facts.append(f"{note} {_link(kept)}")
    return facts


def _kept_sibling(view: View, card: Card) -> Card | None:
    """Return the kept candidate to compare a pruned one with: of its parent, or else of its column and round."""
    if card.state != "pruned":
        return None
    kept = [other for other in view.cells[card.round, card.column] if other.state != "pruned"]
    return min(kept, key=lambda o: (o.parent != card.parent, o.state != "winner", -(o.score or 0), o.id), default=None)


def _retrace(view: View, retrace: Retrace) -> str:
    columns = len(view.headings)
    middle = min(max(50 * (retrace.start + retrace.end + 1) / columns, 25), 75)  # keeps the label on the board
    round = retrace.round if retrace.round in view.rounds else view.rounds[-1]  # the budget may end before it begins
    return (
        f'<div class="retrace" data-round="{round}">{arrow(retrace.start, retrace.end, columns)}'
        f'<p style="--middle: {middle:.2f}%"><b>↩ {escape(retrace.headline)}</b><br>{escape(retrace.reason)}</p></div>'
    )


def _link(card: Card) -> str:
    return f'<a href="#n{card.id}">#{card.id}</a>'


def _cut(note: str) -> str:
    return note if len(note) <= NOTE_LENGTH else f"{note[:NOTE_LENGTH]}…"
