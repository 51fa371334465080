"""The formats that TRL has: prompt-completion, preference and unpaired preference, with images."""

from collections.abc import Iterable, Iterator, Sequence
from statistics import fmean
from typing import Any

from llava_cot.data.forms import MESSAGES, Form
from llava_cot.data.traces import By, Item, TraceNode, TraceTree, row_of, text_of

Row = dict[str, Any]
ROUNDING = 1e-9  # what the mean of equal scores may differ from them


def to_sft(items: Iterable[Item], form: Form = MESSAGES, *, keep_wrong: bool = False) -> Iterator[Row]:
    """The answers of the searches: ``prompt``, ``completion`` (all stages), ``images``; TRL's prompt-completion.

    A search that failed makes no row, nor does an answer that did not end as it should, or one that is known to be
    wrong (unless ``keep_wrong``), which is rejection sampling.
    """
    for item in items:
        tree = TraceTree(item)
        if tree.answer is None:
            continue
        path = tree.path(tree.answer)
        is_wrong = tree.is_right(tree.answer) is False and not keep_wrong
        if is_wrong or not tree.is_finished(tree.answer) or any(node.failed or not node.closed for node in path):
            continue
        yield row_of(
            tree,
            path,
            prompt=form.prompt(tree.question, "", tree.bos),
            completion=form.completion(text_of(path), True),
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
    """Best against worst sibling under one prefix: ``prompt``, ``chosen``, ``rejected``, ``images``; TRL's preference.

    A trace makes one pair for each prefix that has one: its best candidate, and the worst that differs in its text and
    passes the filters. Where the right answers below both are known and say the opposite of the scores, there is none.
    ``nodes`` are chosen and rejected, ``values`` what they were ranked by, ``stage`` is that of the chosen one ("" of a
    whole answer), ``parent`` the node they share, 0 the prompt.

    Args:
        form: ``TextForm(processor)`` for TRL, for what ``llava_cot.data.forms`` says.
        by: the candidates' scores, or the share of the answers below them that are right.
        min_margin: how far the two must be apart; equals are never paired.
        max_length_gap: tokens that one may have more than the other.
        max_length_ratio: how many times as long one may be as the other.
        allow_unclosed: take candidates too that did not end as they should.
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
                    break  # those before it are closer still
                if best.text.strip() == worst.text.strip() or is_too_uneven(best, worst) or _lies(tree, best, worst):
                    continue
                yield row_of(
                    tree,
                    [best, worst],
                    prompt=form.prompt(tree.question, text_of(tree.prefix(best)), tree.bos),
                    chosen=form.completion(best.text, tree.is_finished(best)),
                    rejected=form.completion(worst.text, tree.is_finished(worst)),
                    values=[high, low],
                    stage=best.stage or "",
                    parent=best.parent,
                )
                break


def to_unpaired(
    items: Iterable[Item], form: Form, *, by: By = "score", min_margin: float = 0.0, allow_unclosed: bool = False
) -> Iterator[Row]:
    """Labelled completions: ``prompt``, ``completion``, ``label``, ``images``; TRL's unpaired preference, for KTO.

    ``by="answers"``: every whole answer, from the prompt on, and whether it is right. ``by="score"``: every candidate
    after its prefix, true if its score is above the mean of its siblings and false if it is below, by ``min_margin`` at
    least. ``value`` is the number behind the label: 1 or 0, or the distance from the mean. What was drawn twice under a
    prefix is one row, and counts twice in the mean.
    """
    for item in items:
        tree = TraceTree(item)
        tree.check(by)
        if by == "answers":
            labelled = _labelled_answers(tree)
        else:
            labelled = _labelled_candidates(tree, max(min_margin, ROUNDING), allow_unclosed)
        seen = set()
        for path, value, label in labelled:
            prefix = [] if by == "answers" else tree.prefix(path[-1])
            texts = text_of(prefix), text_of(path)
            if texts in seen:
                continue
            seen.add(texts)
            yield row_of(
                tree,
                path,
                prompt=form.prompt(tree.question, texts[0], tree.bos),
                completion=form.completion(texts[1], tree.is_finished(path[-1])),
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
    """Those that may become a label and what they are worth, the best first."""
    eligible = [node for node in siblings if node.text and (node.closed or allow_unclosed)]
    worth = [(value, node) for node in eligible if (value := tree.quality(node, by)) is not None]
    return sorted(worth, key=lambda pair: (-pair[0], pair[1].id))


def _lies(tree: TraceTree, best: TraceNode, worst: TraceNode) -> bool:
    shares = tree.share_right(best), tree.share_right(worst)
    return shares[0] is not None and shares[1] is not None and shares[0] < shares[1]
