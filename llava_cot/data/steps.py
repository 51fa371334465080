"""Step labels for process reward models: each finished answer as a list of stages, with a value for each."""

from collections.abc import Iterable, Iterator
from statistics import fmean
from typing import Any

from llava_cot.data.forms import MESSAGES
from llava_cot.data.traces import Item, TraceNode, TraceTree, row_of
from llava_cot.scoring import Calibration
from llava_cot.stages import asked


def to_steps(
    items: Iterable[Item], *, calibration: Calibration | None = None, threshold: float = 0.5
) -> Iterator[dict[str, Any]]:
    """Yield one row for each finished answer with a text of its own.

    A row has ``prompt``, ``completions`` (one per stage), ``values`` in [0, 1], ``labels`` (value >= threshold) and
    ``images``. The value of a step is the share of right answers among those at and below it, if any is known
    (``sources``: "answers"). Otherwise it is the rank of its score: among the scores of ``calibration``
    ("calibration"), or among those of its own stage in this trace ("rank"; 0.5 if it is alone). An answer with a step
    that has neither makes no row. A whole answer that was drawn in one piece is cut after its closing tags, and its
    stages share one value. A step that the user's turn asks for begins with that turn, as ``llava_cot.stages.asked``
    shows it, since a reward model reads the steps as one text.

    Raises:
        ValueError: ``threshold`` is not in [0, 1], or ``calibration`` is of another scorer than that of a trace.
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must be in [0, 1], got {threshold}")
    for item in items:
        tree = TraceTree(item)
        scorer = tree.trace.data["config"].get("scorer")
        if calibration is not None and scorer != calibration.scorer:
            raise ValueError(
                f"calibration must be of scorer {scorer!r} of trace {tree.trace_id!r}, got {calibration.scorer!r}"
            )
        seen = set()
        for leaf in tree.nodes.values():
            path = tree.path(leaf)
            if not tree.is_finished(leaf) or any(node.failed or not node.closed for node in path):
                continue
            steps = [(node, stage, text) for node in path for stage, text in _cut(tree, node)]
            found = [_value(tree, node, calibration) for node, _, _ in steps]
            values = [value for value in found if value is not None]
            if len(values) == len(steps) and (text := "".join(text for _, _, text in steps)) not in seen:
                seen.add(text)
                yield row_of(
                    tree,
                    [node for node, _, _ in steps],
                    prompt=MESSAGES.prompt(tree.question, [], tree.bos),
                    completions=[text for _, _, text in steps],
                    stages=[stage for _, stage, _ in steps],
                    values=[value for value, _ in values],
                    labels=[value >= threshold for value, _ in values],
                    sources=[source for _, source in values],
                )


def _cut(tree: TraceTree, node: TraceNode) -> list[tuple[str, str]]:
    """Split the text of ``node`` into stages: pairs of name ("" if no tag closes) and text."""
    if node.stage is not None:
        return [(node.stage, asked(node.turn) + node.text)]
    closed = [part for part in tree.grammar.parts(node.text, ended=node.closed) if part.closed]
    bounds = [0, *(part.end + len(tree.grammar.tag_pair(part.name)[1]) for part in closed)]
    cut = [(part.name, node.text[start:end]) for part, start, end in zip(closed, bounds, bounds[1:])]
    rest = node.text[bounds[-1] :]
    if not cut or rest.strip():
        return [*cut, ("", rest)]
    return [*cut[:-1], (cut[-1][0], cut[-1][1] + rest)]


def _value(tree: TraceTree, node: TraceNode, calibration: Calibration | None) -> tuple[float, str] | None:
    """Return the value of ``node`` and its source."""
    share = tree.share_right(node)
    if share is not None:
        return share, "answers"
    if node.score is None:
        return None
    if calibration is not None and node.stage is not None:
        return calibration.quantile(node.stage, node.score), "calibration"
    others = [n.score for n in tree.nodes.values() if n.stage == node.stage and n is not node and n.score is not None]
    below = [1.0 if score < node.score else 0.5 if score == node.score else 0.0 for score in others]
    return (fmean(below) if below else 0.5), "rank"
