"""Read a trace for training: its candidates as a tree, and how good each is known to be."""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Literal

from llava_cot.scoring.normalise import normalise
from llava_cot.search.tree import TRACE_VERSION, Trace
from llava_cot.stages import Grammar, Outcome

ROW_VERSION = 1
By = Literal["score", "answers"]  # by a candidate's score, or by the share of right answers that end at or below it


@dataclass(frozen=True)
class Item:
    """A trace, with what it does not hold.

    Args:
        trace: ``answer.trace``, its ``data``, or its JSON.
        image: the name of the image in the rows, such as the path of its file. The caller saves the image.
        gold: the right answer. It is compared with a conclusion as ``normalise`` writes both.
        is_right: used instead of ``gold``: a function of the conclusion, or a verdict on each whole answer by node id.
        id: the name of the trace in the rows; by default a hash of its settings and of what was drawn.
    """

    trace: Trace | Mapping[str, Any] | str
    image: str
    gold: str | None = None
    is_right: Callable[[str], bool] | Mapping[int, bool] | None = None
    id: str | None = None


@dataclass(frozen=True, eq=False)
class TraceNode:
    """A candidate of a trace. ``parent`` 0 is the prompt. ``score`` is None if no label can be made from it."""

    id: int
    parent: int
    stage: str | None
    text: str
    tokens: list[int]
    logprobs: list[float]
    sampling_logprobs: list[float]
    finish: str | None
    closed: bool
    kept: bool
    score: float | None
    failed: bool  # the scorer raised or gave no finite number


class TraceTree:
    """The candidates of ``item`` by id. Every parent comes before its children.

    Raises:
        ValueError: the trace is not of this version, or its question is null, as after ``generate``.
    """

    def __init__(self, item: Item):
        data = _data_of(item.trace)
        self.item, self.data = item, data
        entries = [_node(entry) for entry in data["nodes"]]
        self.trace_id = item.id or trace_id(data)
        if not isinstance(data["question"], str):
            raise ValueError(
                f"question of trace {self.trace_id!r} must be a string, got {data['question']!r}: "
                "generate() is given tokens alone, answer() keeps the question"
            )
        if not isinstance(item.image, str) or not item.image:
            raise ValueError(f"image of trace {self.trace_id!r} must be a path or another string, got {item.image!r}")
        self.question: str = data["question"]
        self.bos: str = data["bos"]
        self.grammar = Grammar(**data["grammar"])
        self.nodes: dict[int, TraceNode] = {}
        for node in entries:
            if node.parent and node.parent not in self.nodes:
                raise ValueError(f"node {node.id} of trace {self.trace_id!r} must have a parent, got {node.parent}")
            self.nodes[node.id] = node
        if data["answer"] not in self.nodes:
            raise ValueError(f"answer of trace {self.trace_id!r} must be one of its nodes, got {data['answer']}")
        self.answer = self.nodes[data["answer"]]
        self._shares = self._count_right()

    def path(self, node: TraceNode) -> list[TraceNode]:
        """Return the nodes from the first stage to this one."""
        nodes = [node]
        while nodes[-1].parent:
            nodes.append(self.nodes[nodes[-1].parent])
        return nodes[::-1]

    def prefix(self, node: TraceNode) -> list[TraceNode]:
        """Return the text after which ``node`` was drawn."""
        return self.path(node)[:-1]

    def siblings(self) -> Iterator[list[TraceNode]]:
        """Return the candidates after each prefix, of all rounds. Stages and whole answers are separate sets."""
        sets: dict[tuple[int, bool], list[TraceNode]] = {}
        for node in self.nodes.values():
            sets.setdefault((node.parent, node.stage is None), []).append(node)
        return iter(sets.values())

    def is_finished(self, node: TraceNode) -> bool:
        """Return whether a whole answer ends with ``node``."""
        return node.closed and (
            node.finish == "eos" or (node.stage is not None and not self.grammar.follows[node.stage])
        )

    def is_right(self, node: TraceNode) -> bool | None:
        """Return whether the answer that ends with ``node`` is right, or None if unknown or if none ends there."""
        gold, verdict = self.item.gold, self.item.is_right
        if not self.is_finished(node) or (gold is None and verdict is None):
            return None
        if isinstance(verdict, Mapping):
            return verdict.get(node.id)
        conclusion = self.grammar.parse(text_of(self.path(node)))[self.grammar.conclusion]
        if conclusion.outcome is not Outcome.COMPLETE:
            return False
        if verdict is not None:
            return bool(verdict(conclusion.text))
        return normalise(conclusion.text) == normalise(str(gold))

    def share_right(self, node: TraceNode) -> float | None:
        """Return the share of right ones among the finished answers at and below ``node``, or None if unknown."""
        return self._shares.get(node.id)

    def quality(self, node: TraceNode, by: By) -> float | None:
        """Return how good ``node`` is, or None if no label can be made from it."""
        if node.failed:
            return None
        return node.score if by == "score" else self.share_right(node)

    def check(self, by: By) -> None:
        """Check ``by``.

        Raises:
            ValueError: it is unknown, or it is "answers" and no answer of this trace is known to be right or wrong.
        """
        if by not in ("score", "answers"):
            raise ValueError(f"by must be 'score' or 'answers', got {by!r}")
        if by == "answers" and self.item.gold is None and self.item.is_right is None:
            raise ValueError(f"trace {self.trace_id!r} must come with gold or is_right for by='answers', got neither")

    def _count_right(self) -> dict[int, float]:
        known, right = dict.fromkeys(self.nodes, 0), dict.fromkeys(self.nodes, 0)
        for node in reversed(self.nodes.values()):  # children before parents
            verdict = self.is_right(node)
            known[node.id] += verdict is not None
            right[node.id] += bool(verdict)
            if node.parent:
                known[node.parent] += known[node.id]
                right[node.parent] += right[node.id]
        return {id: right[id] / count for id, count in known.items() if count}


def trace_id(data: Mapping[str, Any]) -> str:
    """Hash the content without times and scores. A trace, its JSON and a repeated search have the same hash."""
    nodes = [[node["id"], node["parent"], node["tokens"], node["logprobs"]] for node in data["nodes"]]
    # The same tokens may come from another image, with other log-probs, or with another scorer, which config names.
    content = {name: data.get(name) for name in ("seed", "question", "model", "search", "config")} | {"nodes": nodes}
    return blake2b(Trace(content).to_json().encode(), digest_size=12).hexdigest()


def row_of(tree: TraceTree, nodes: Iterable[TraceNode], **columns: Any) -> dict[str, Any]:
    """Return a row with its origin."""
    ids = [node.id for node in nodes]
    return {**columns, "images": [tree.item.image], "trace_id": tree.trace_id, "nodes": ids, "version": ROW_VERSION}


def text_of(nodes: Iterable[TraceNode]) -> str:
    """Join the texts of the nodes."""
    return "".join(node.text for node in nodes)


def _data_of(trace: Any) -> Mapping[str, Any]:
    if isinstance(trace, str):
        trace = json.loads(trace)
    data = trace.data if isinstance(trace, Trace) else trace
    if not isinstance(data, Mapping):
        raise ValueError(f"trace must be a search's trace, got {type(data).__name__}")
    if data.get("version") != TRACE_VERSION:
        raise ValueError(f"trace must have version {TRACE_VERSION}, got {data.get('version')!r}")
    names = ("question", "search", "config", "grammar", "seed", "bos", "prompt_tokens", "nodes", "events", "answer")
    missing = [name for name in names if name not in data]
    if missing:
        raise ValueError(f"trace must have {missing[0]!r}, got {sorted(data)}")
    return data


def _node(entry: Mapping[str, Any]) -> TraceNode:
    names = ("id", "stage", "text", "tokens", "logprobs", "sampling_logprobs", "finish", "closed", "kept")
    missing = [name for name in ("parent", "score", "error", *names) if name not in entry]
    if missing:
        raise ValueError(f"trace must have nodes with {missing[0]!r}, got {dict(entry)!s:.80}")
    score = None if entry["score"] is None else float(entry["score"])  # JSON spells infinities "inf" and "-inf"
    failed = entry["error"] is not None or (score is not None and not math.isfinite(score))
    return TraceNode(
        parent=entry["parent"] or 0,
        score=None if failed else score,
        failed=failed,
        **{name: entry[name] for name in names},
    )
