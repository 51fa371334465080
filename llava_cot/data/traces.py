"""Read a trace for training: its candidates as a tree, and how good each is known to be."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Literal

from llava_cot.data.forms import Chat
from llava_cot.stages import Outcome
from llava_cot.text import normalise
from llava_cot.trace import Trace, to_json
from llava_cot.trace.schema import NodeData

ROW_VERSION = 1
By = Literal["score", "answers"]  # by a candidate's score, or by the share of right answers that end at or below it


@dataclass(frozen=True)
class Item:
    """A trace, with what it does not hold.

    Args:
        trace: ``answer.trace``, or what ``llava_cot.trace.parse_trace`` returns.
        image: the name of the image in the rows, such as the path of its file. The caller saves the image.
        gold: the right answer. It is compared with a conclusion as ``normalise`` writes both.
        is_right: used instead of ``gold``: a function of the conclusion, or a verdict on each whole answer by node id.
        id: the name of the trace in the rows; by default a hash of its settings and of what was drawn.
    """

    trace: Trace
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
    turn: str  # the user's turn that asked for it; empty if none did
    given: list[int]  # the tokens of that turn
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
        TypeError: the trace is not a ``Trace``.
        ValueError: its question is null, as after ``generate``, or its image is not named.
    """

    def __init__(self, item: Item) -> None:
        trace = item.trace
        if not isinstance(trace, Trace):
            raise TypeError(f"trace must be a Trace, got {type(trace).__name__}; parse_trace(...) makes one of JSON")
        self.item, self.trace, self.grammar = item, trace, trace.grammar
        self.trace_id = item.id or trace_id(trace)
        question = trace.data["question"]
        if question is None:
            raise ValueError(
                f"question of trace {self.trace_id!r} must be a string, got None: "
                "generate() is given tokens alone, answer() keeps the question"
            )
        if not isinstance(item.image, str) or not item.image:
            raise ValueError(f"image of trace {self.trace_id!r} must be a path or another string, got {item.image!r}")
        self.question: str = self.grammar.question(question)  # as the model was asked
        self.bos = trace.data["bos"]
        self.nodes = {id: _node(node) for id, node in trace.nodes.items()}
        answer = trace.data["answer"]
        self.answer = None if answer is None else self.nodes[answer]  # None: there is none
        self._shares = self._count_right()

    def path(self, node: TraceNode) -> list[TraceNode]:
        """Return the nodes from the first stage to this one."""
        return [self.nodes[data["id"]] for data in self.trace.path(node.id)]

    def prefix(self, node: TraceNode) -> list[TraceNode]:
        """Return the text after which ``node`` was drawn."""
        return self.path(node)[:-1]

    def siblings(self) -> Iterator[list[TraceNode]]:
        """Return the candidates after each prefix, of all rounds. Stages and whole answers are separate sets."""
        sets: dict[tuple[int, bool, str], list[TraceNode]] = {}
        for node in self.nodes.values():
            sets.setdefault((node.parent, node.stage is None, node.turn), []).append(node)
        return iter(sets.values())

    def is_finished(self, node: TraceNode) -> bool:
        """Return whether a whole answer ends with ``node``."""
        if node.stage is not None:
            return node.closed and not self.grammar.follows[node.stage]
        if not node.closed or node.finish != "eos" or not self.grammar.turns:
            return node.closed and node.finish == "eos"
        stages = [part.name for part in self.grammar.parts(self.trace.text(node.id))]
        return self.grammar.next_turn(stages) is None

    def ends_turn(self, node: TraceNode) -> bool:
        """Return whether the model's turn ends with ``node``, because it has written EOS or a whole answer."""
        return node.closed and (node.finish == "eos" or self.is_finished(node))

    def replies(self, path: Sequence[TraceNode]) -> list[tuple[Chat, list[TraceNode]]]:
        """Cut a path where a turn of the user stands. Return what the model has read before each reply, and the reply.

        The replies are what the model wrote. The user's turns are in what it has read.
        """
        starts = [0, *(at for at, node in enumerate(path) if node.turn and at)]
        ends = [*starts[1:], len(path)]
        return [(chat_of(path[:start], path[start].turn), [*path[start:end]]) for start, end in zip(starts, ends)]

    def is_right(self, node: TraceNode) -> bool | None:
        """Return whether the answer that ends with ``node`` is right, or None if unknown or if none ends there."""
        gold, verdict = self.item.gold, self.item.is_right
        if not self.is_finished(node) or (gold is None and verdict is None):
            return None
        if isinstance(verdict, Mapping):
            return verdict.get(node.id)
        conclusion = self.grammar.parse(self.trace.text(node.id))[self.grammar.conclusion]
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


def trace_id(trace: Trace) -> str:
    """Hash the content without times and scores. A trace, its JSON and a repeated search have the same hash."""
    nodes = [[node["id"], node["parent"], node["tokens"], node["logprobs"]] for node in trace.nodes.values()]
    # The same tokens may come from another image, with other log-probs, or with another scorer, which config names.
    data = trace.data
    content = {name: data[name] for name in ("seed", "question", "model", "search", "config")}  # type: ignore[literal-required]
    return blake2b(to_json(content | {"nodes": nodes}).encode(), digest_size=12).hexdigest()


def row_of(tree: TraceTree, nodes: Iterable[TraceNode], **columns: Any) -> dict[str, Any]:
    """Return a row with its origin."""
    ids = [node.id for node in nodes]
    return {**columns, "images": [tree.item.image], "trace_id": tree.trace_id, "nodes": ids, "version": ROW_VERSION}


def chat_of(nodes: Iterable[TraceNode], turn: str = "") -> Chat:
    """Return what the model has read and written up to the last of ``nodes``, and the user's ``turn`` behind it."""
    chat = [("", "")]
    for node in nodes:
        if node.turn:
            chat.append((node.turn, ""))
        chat[-1] = chat[-1][0], chat[-1][1] + node.text
    return [*chat, (turn, "")] if turn else chat


def text_of(nodes: Iterable[TraceNode]) -> str:
    """Join the texts of the nodes, which are those of one reply."""
    return "".join(node.text for node in nodes)


def _node(data: NodeData) -> TraceNode:
    score = data["score"]
    failed = data["error"] is not None or (score is not None and not math.isfinite(score))
    return TraceNode(
        id=data["id"],
        parent=data["parent"],
        stage=data["stage"],
        turn=data["turn"],
        given=data["given"],
        text=data["text"],
        tokens=data["tokens"],
        logprobs=data["logprobs"],
        sampling_logprobs=data["sampling_logprobs"],
        finish=data["finish"],
        closed=data["closed"],
        kept=data["kept"],
        score=None if failed else score,
        failed=failed,
    )
