"""A trace as one HTML page that loads nothing: stages are columns, rounds are rows, and a retrace is an arrow."""

from base64 import b64encode
from collections.abc import Mapping
from hashlib import sha256
from html import escape
from importlib.resources import files
from io import BytesIO
from typing import TYPE_CHECKING, Any

from llava_cot.report import text
from llava_cot.report.svg import arrow, strip
from llava_cot.report.view import Card, Retrace, View, count, number, read, stage_name

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE_SIDE = 512  # pixels at most
IMAGE_BYTES = 200_000  # a larger PNG becomes a JPEG: the page is to stay small


def to_html(
    trace: Mapping[str, Any],
    *,
    image: "Image | None" = None,
    question: str | None = None,
    gold: str | None = None,
) -> str:
    """The page of ``trace.data`` or of its JSON; the same arguments give the same bytes.

    Args:
        image: what the question is about, shown at 512 pixels at most.
        question: by default the trace's own.
        gold: the right answer, where one is known.

    Raises:
        ValueError: it is not a trace.
    """
    view = read(trace)
    question = view.question if question is None else question
    style, script = (files("llava_cot.report").joinpath(name).read_text("utf-8") for name in ("page.css", "page.js"))
    # Should something that a model wrote ever get through as markup, the browser neither runs nor fetches it.
    digest = b64encode(sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    body = _header(view, image, question, gold) + _accounts(view) + _board(view)
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(question or 'A search')}</title><style>{style}</style></head>\n"
        f"<body>{body}<script>{script}</script></body></html>\n"
    )
    return page.encode("utf-8", "replace").decode()  # JSON may hold half characters, which no file can


def _header(view: View, image: "Image | None", question: str, gold: str | None) -> str:
    picture = f'<img src="{_data_url(image)}" alt="the image asked about">' if image else ""
    truth = ""
    if gold is not None:
        same = gold.strip() == view.answer
        truth = f'<dt>gold</dt><dd class="gold">{escape(gold)} {"✓ the same" if same else "≠ not the same"}</dd>'
    numbers = (view.cards, "candidate"), (view.rounds, "round"), (view.retraces, "retrace")
    settings = " · ".join((view.search, f"seed {view.seed}", *(count(len(of), noun) for of, noun in numbers)))
    return (
        f'<header class="top">{picture}<div><h1>{escape(question or "A search")}</h1><dl>'
        f'<dt>answer</dt><dd class="answer">{text.to_html(view.answer)}</dd>{truth}'
        f"<dt>search</dt><dd>{escape(settings)}</dd></dl></div></header>\n"
    )


def _data_url(image: "Image") -> str:
    small = image.convert("RGB")
    small.thumbnail((IMAGE_SIDE, IMAGE_SIDE))
    for kind in ("png", "jpeg"):
        file = BytesIO()
        small.save(file, kind)
        if len(file.getvalue()) <= IMAGE_BYTES:
            break
    return f"data:image/{kind};base64,{b64encode(file.getvalue()).decode()}"


def _accounts(view: View) -> str:
    rows = [
        (stage_name(a.stage), a.candidates, a.tokens, a.path, f"{1 - a.path / a.tokens:.0%}", f"{a.seconds:.2f}")
        for a in view.accounts
        if a.tokens
    ]
    seconds = f"{sum(account.seconds for account in view.accounts):.2f}"
    rows.append(("all", len(view.cards), view.generated, view.path, f"{view.wasted:.0%}", seconds))
    names = ("", "candidates", "tokens drawn", "in the answer", "wasted", "seconds")
    head = "".join(f"<th>{name}</th>" for name in names)
    lines = "".join(f"<tr><th>{row[0]}</th>{''.join(f'<td>{cell}</td>' for cell in row[1:])}</tr>" for row in rows)
    usage = ", ".join(view.usage)
    return (
        f'<section class="accounts"><p><b>{view.wasted:.0%} of the drawn tokens are wasted</b>: '
        f"{view.generated - view.path:,} of {view.generated:,} are not in the answer.</p>"
        f'<div class="wide"><table><tr>{head}</tr>{lines}</table></div><p class="note">{usage}</p></section>\n'
    )


def _board(view: View) -> str:
    columns = max(1, len(view.stages))
    rows = {round: row for row, round in enumerate(view.rounds)}
    parts = []
    for stage in view.stages:
        cards = [card for card in view.cards.values() if card.stage == stage]
        cutoffs = {pool.cutoff for (_, of), pool in view.pools.items() if of == stage and pool.cutoff is not None}
        parts.append(
            f'<section class="head"><h2>{escape(stage_name(stage))}</h2>{strip(cards, sorted(cutoffs), rows)}</section>'
        )
    for round in view.rounds:
        parts.append(f'<h3 class="round" data-round="{round}">round {round}</h3>')
        parts += [_cell(view, round, stage) for stage in view.stages]
        parts += [_retrace(view, retrace) for retrace in view.retraces if retrace.round == round + 1]
    return f'<main class="wide"><div class="board" style="--columns: {columns}">{"".join(parts)}</div></main>\n'


def _cell(view: View, round: int, stage: str | None) -> str:
    cards, pool = view.cells.get((round, stage), []), view.pools.get((round, stage))
    parts = [f'<p class="note">{escape(pool.verdict)}</p>'] if pool and pool.cutoff is not None else []
    if pool and pool.carried:
        links = ", ".join(f'<a href="#n{c.id}">#{c.id}</a> {number(c.score)} (round {c.round})' for c in pool.carried)
        parts.append(f'<p class="note carried">⤴ carried over into this pool: {links}</p>')
    parts += [_card(view, card) for card in cards]
    return f'<section class="cell" data-round="{round}">{"".join(parts)}</section>'


def _card(view: View, card: Card) -> str:
    kept = _kept_sibling(view, card)
    into = [r for (r, _), pool in view.pools.items() if any(card is member for member in pool.carried)]
    facts = [
        count(card.tokens, "token"),
        f"mean log-prob {number(card.logprob)}",
        f"ended by {escape(card.finish)}",
        f"{card.seconds:.2f} s",
        f"seed {card.seed}",
    ]
    facts += [f'under <a href="#n{card.parent}">#{card.parent}</a>'] if card.parent in view.cards else []
    facts += [f"⤴ also in the pool of round {', '.join(map(str, into))}"] if into else []
    if kept:
        note = "the same text as" if card.text == kept.text else "<mark>marked</mark>: not in"
        facts.append(f'{note} <a href="#n{kept.id}">#{kept.id}</a>')
    unclosed = "" if card.closed else ' <b class="unclosed">✗ unclosed</b>'
    return (
        f'<article class="card {card.state}" id="n{card.id}" tabindex="0" data-round="{card.round}" '
        f'data-state="{card.state}" data-parent="n{card.parent}"><header><span class="id">#{card.id}</span> '
        f'<b class="state">{card.label}</b>{unclosed}<span class="score">{number(card.score)}</span></header>'
        f'{text.to_html(card.text, kept.text if kept else None)}<p class="facts">{" · ".join(facts)}</p></article>'
    )


def _kept_sibling(view: View, card: Card) -> Card | None:
    """What to compare a pruned candidate with: the kept one of its parent, or else of its stage and round."""
    if card.state != "pruned":
        return None
    kept = [other for other in view.cells[card.round, card.stage] if other.state != "pruned"]
    return min(kept, key=lambda o: (o.parent != card.parent, o.state != "winner", -(o.score or 0), o.id), default=None)


def _retrace(view: View, retrace: Retrace) -> str:
    columns = len(view.stages)
    start, end = (view.stages.index(s) if s in view.stages else 0 for s in (retrace.stage, retrace.to))
    middle = min(max(50 * (start + end + 1) / columns, 25), 75)  # the label stays on the board
    return (
        f'<div class="retrace" data-round="{retrace.round}">{arrow(start, end, columns)}'
        f'<p style="--middle: {middle:.2f}%"><b>↩ {escape(retrace.headline)}</b><br>{escape(retrace.reason)}</p></div>'
    )
