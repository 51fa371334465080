"""A trace read back for training: its candidates as a tree, and what is known of how good each is."""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Literal

from llava_cot.search.tree import TRACE_VERSION, Trace
from llava_cot.stages import Grammar, Outcome
from llava_cot.text import normalise

ROW_VERSION = 1
By = Literal["score", "answers"]  # by a candidate's score, or by the share of the answers below it that are right


@dataclass(frozen=True)
class Item:
    """A trace and what it doesn't hold.

    Args:
        trace: as ``answer.trace``, its ``data``, or the JSON of it.
        image: what stands for the image in the rows, such as its file's path; whoever makes the item saves the image.
        gold: the right answer, compared with a conclusion as ``normalise`` spells both.
        is_right: in its place a function of the conclusion, or a verdict on each whole answer by its node's id.
        id: the trace's name in the rows; by default a hash of its settings and of what was drawn.
    """

    trace: Trace | Mapping[str, Any] | str
    image: str
    gold: str | None = None
    is_right: Callable[[str], bool] | Mapping[int, bool] | None = None
    id: str | None = None


@dataclass(frozen=True, eq=False)
class TraceNode:
    """A candidate of a trace. ``parent`` 0 is the prompt; ``score`` None: it has none that a label could be made of."""

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
    failed: bool  # its scorer raised, or gave no finite number


class TraceTree:
    """The candidates of ``item`` by id; every parent comes before its children.

    Raises:
        ValueError: it is no trace of this version, or its question is null, which ``generate`` leaves.
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
        """The nodes from the first stage to this one."""
        nodes = [node]
        while nodes[-1].parent:
            nodes.append(self.nodes[nodes[-1].parent])
        return nodes[::-1]

    def prefix(self, node: TraceNode) -> list[TraceNode]:
        """What ``node`` was drawn after."""
        return self.path(node)[:-1]

    def siblings(self) -> Iterator[list[TraceNode]]:
        """The candidates under each prefix, of all rounds; stages and whole answers are two sets."""
        sets: dict[tuple[int, bool], list[TraceNode]] = {}
        for node in self.nodes.values():
            sets.setdefault((node.parent, node.stage is None), []).append(node)
        return iter(sets.values())

    def is_finished(self, node: TraceNode) -> bool:
        """Whether a whole answer ends with ``node``."""
        return node.closed and (
            node.finish == "eos" or (node.stage is not None and not self.grammar.follows[node.stage])
        )

    def is_right(self, node: TraceNode) -> bool | None:
        """Whether the answer that ends with ``node`` is right; None where that is not known or none ends there."""
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
        """Of the finished answers at and below ``node`` the share that is right; None where there are none known."""
        return self._shares.get(node.id)

    def quality(self, node: TraceNode, by: By) -> float | None:
        """How good ``node`` is; None where no label can be made of it."""
        if node.failed:
            return None
        return node.score if by == "score" else self.share_right(node)

    def check(self, by: By) -> None:
        """Raises ``ValueError`` if ``by`` is unknown, or asks for what is known of no answer of this trace."""
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
    """A name for the content, times and scores aside: equal for a trace and its JSON, and for the same search again."""
    nodes = [[node["id"], node["parent"], node["tokens"], node["logprobs"]] for node in data["nodes"]]
    # The same tokens may come of another image, with other log-probs, or under another scorer, which config names.
    content = {name: data.get(name) for name in ("seed", "question", "model", "search", "config")} | {"nodes": nodes}
    return blake2b(Trace(content).to_json().encode(), digest_size=12).hexdigest()


def row_of(tree: TraceTree, nodes: Iterable[TraceNode], **columns: Any) -> dict[str, Any]:
    """A row that says where it comes from."""
    ids = [node.id for node in nodes]
    return {**columns, "images": [tree.item.image], "trace_id": tree.trace_id, "nodes": ids, "version": ROW_VERSION}


def text_of(nodes: Iterable[TraceNode]) -> str:
    """What they wrote, one after another."""
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
