"""The formats of TRL: prompt-completion, preference and unpaired preference, with images."""

from collections.abc import Iterable, Iterator, Sequence
from statistics import fmean
from typing import Any

from llava_cot.data.forms import MESSAGES, Form
from llava_cot.data.traces import By, Item, TraceNode, TraceTree, chat_of, row_of, text_of

Row = dict[str, Any]
ROUNDING = 1e-9  # the mean of equal scores may differ from them by this


def to_sft(items: Iterable[Item], form: Form = MESSAGES, *, keep_wrong: bool = False) -> Iterator[Row]:
    """Yield the answers of the searches in TRL's prompt-completion format.

    A row has ``prompt``, ``completion`` (all stages) and ``images``. A search that failed makes no row, and an answer
    that did not end as it should makes none. An answer that is known to be wrong makes none either, unless
    ``keep_wrong``: this is rejection sampling. An answer of several replies, which turns of the user asked for, makes a
    row for each of them, after the chat up to it.
    """
    for item in items:
        tree = TraceTree(item)
        if tree.answer is None:
            continue
        path = tree.path(tree.answer)
        is_wrong = tree.is_right(tree.answer) is False and not keep_wrong
        if is_wrong or not tree.is_finished(tree.answer) or any(node.failed or not node.closed for node in path):
            continue
        for chat, reply in tree.replies(path):
            yield row_of(
                tree,
                reply,
                prompt=form.prompt(tree.question, chat, tree.bos),
                completion=form.completion(text_of(reply), True),
            )


def to_preferences(
    items: Iterable[Item],
    form: Form,
    *,
    by: By = "score",
    min_margin: float = 0.0,
    max_length_gap: int | None = None,
    max_length_ratio: float | None = None,
    allow_unclosed: bool = False,
) -> Iterator[Row]:
    """Yield the best and the worst sibling after one prefix in TRL's preference format.

    A row has ``prompt``, ``chosen``, ``rejected`` and ``images``. A trace makes at most one pair for each prefix: its
    best candidate, and the worst one that differs in its text and passes the filters. There is no pair if the known
    answers below both contradict the scores. ``nodes`` and ``values`` have the chosen one first; ``values`` are what
    the two were ranked by. ``stage`` is that of the chosen one ("" for a whole answer). ``parent`` is the node that
    they share, or 0 for the prompt.

    Args:
        form: ``TextForm(processor)`` for TRL, for the reasons in ``llava_cot.data.forms``.
        by: rank by the candidates' scores, or by the share of right answers at and below them.
        min_margin: the least distance between the two. Equal candidates are never paired.
        max_length_gap: the most tokens by which one may be longer than the other.
        max_length_ratio: the largest ratio of their lengths.
        allow_unclosed: whether to take candidates that did not end as they should.
    """
    if not min_margin >= 0:
        raise ValueError(f"min_margin must be >= 0, got {min_margin}")
    if max_length_gap is not None and max_length_gap < 0:
        raise ValueError(f"max_length_gap must be >= 0, got {max_length_gap}")
    if max_length_ratio is not None and not max_length_ratio >= 1:
        raise ValueError(f"max_length_ratio must be >= 1, got {max_length_ratio}")

    def is_too_uneven(best: TraceNode, worst: TraceNode) -> bool:
        short, long = sorted((len(best.tokens), len(worst.tokens)))
        is_gap = max_length_gap is not None and long - short > max_length_gap
        return is_gap or (max_length_ratio is not None and long > max_length_ratio * short)

    for item in items:
        tree = TraceTree(item)
        tree.check(by)
        for siblings in tree.siblings():
            ranked = _ranked(tree, siblings, by, allow_unclosed)
            for low, worst in reversed(ranked):
                high, best = ranked[0]
                if high - low <= 0 or high - low < min_margin:
                    break  # earlier ones are even closer
                if best.text.strip() == worst.text.strip() or is_too_uneven(best, worst) or _lies(tree, best, worst):
                    continue
                yield row_of(
                    tree,
                    [best, worst],
                    prompt=form.prompt(tree.question, chat_of(tree.prefix(best), best.turn), tree.bos),
                    chosen=form.completion(best.text, tree.ends_turn(best)),
                    rejected=form.completion(worst.text, tree.ends_turn(worst)),
                    values=[high, low],
                    stage=best.stage or "",
                    parent=best.parent,
                )
                break


def to_unpaired(
    items: Iterable[Item], form: Form, *, by: By = "score", min_margin: float = 0.0, allow_unclosed: bool = False
) -> Iterator[Row]:
    """Yield labelled completions in TRL's unpaired preference format, e.g. for KTO.

    A row has ``prompt``, ``completion``, ``label`` and ``images``. With ``by="answers"`` it is a whole answer, from the
    prompt on, and whether it is right. With ``by="score"`` it is a candidate after its prefix. Its label is true if its
    score is above the mean of its siblings and false if it is below, by at least ``min_margin``. ``value`` is the
    number that the label comes from: 1 or 0, or the distance from the mean. A completion that was drawn twice after a
    prefix is one row, and counts twice in the mean. An answer of several replies, which turns of the user asked for,
    makes a row for each of them. A reply that a right and a wrong answer share makes none.
    """
    for item in items:
        tree = TraceTree(item)
        tree.check(by)
        if by == "answers":
            labelled = _labelled_answers(tree)
        else:
            labelled = _labelled_candidates(tree, max(min_margin, ROUNDING), allow_unclosed)
        found: dict[tuple[Any, ...], list[tuple[list[TraceNode], float, bool]]] = {}
        for path, value, label in labelled:
            prefix = chat_of(tree.prefix(path[0]), path[0].turn)
            for chat, reply in tree.replies(path) if by == "answers" else [(prefix, path)]:
                found.setdefault((*chat, text_of(reply)), []).append((reply, value, label))
        for (*chat, text), drawn in found.items():
            reply, value, label = drawn[0]
            if by == "answers" and any(other != label for _, _, other in drawn):
                continue
            yield row_of(
                tree,
                reply,
                prompt=form.prompt(tree.question, chat, tree.bos),
                completion=form.completion(text, tree.ends_turn(reply[-1])),
                label=label,
                value=value,
            )


def _labelled_answers(tree: TraceTree) -> Iterator[tuple[list[TraceNode], float, bool]]:
    for node in tree.nodes.values():
        path, verdict = tree.path(node), tree.is_right(node)
        if verdict is not None and not any(n.failed or not n.closed for n in path):
            yield path, float(verdict), verdict


def _labelled_candidates(
    tree: TraceTree, margin: float, allow_unclosed: bool
) -> Iterator[tuple[list[TraceNode], float, bool]]:
    for siblings in tree.siblings():
        ranked = _ranked(tree, siblings, "score", allow_unclosed)
        mean = fmean(score for score, _ in ranked) if ranked else 0.0
        for score, node in ranked:
            if abs(score - mean) >= margin:
                yield [node], score - mean, score > mean


def _ranked(
    tree: TraceTree, siblings: Sequence[TraceNode], by: By, allow_unclosed: bool
) -> list[tuple[float, TraceNode]]:
    """Return the candidates that may become a label, with their values, the best first."""
    eligible = [node for node in siblings if node.text and (node.closed or allow_unclosed)]
    worth = [(value, node) for node in eligible if (value := tree.quality(node, by)) is not None]
    return sorted(worth, key=lambda pair: (-pair[0], pair[1].id))


def _lies(tree: TraceTree, best: TraceNode, worst: TraceNode) -> bool:
    shares = tree.share_right(best), tree.share_right(worst)
    return shares[0] is not None and shares[1] is not None and shares[0] < shares[1]
