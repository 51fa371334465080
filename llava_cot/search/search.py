"""What a policy works with: it grows the tree, scores nodes and tells what happened."""

import math
import time
from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from llava_cot.engine.branch import Branch, Expand, Finish, SamplingParams
from llava_cot.scoring import Calibration, Scorer, Span
from llava_cot.search.events import Candidate, Candidates, Event, Retrace, StageFinal
from llava_cot.search.tree import Decision, Node, candidate_seed
from llava_cot.stages import Stage

Scope = Literal["stage", "path"]


@dataclass(eq=False)
class Search:
    """One search of one question. A policy is ``def policy(search) -> Generator[..., Node]``:

    >>> def best_of_two(search):
    ...     nodes = yield from search.expand([search.root], 2, None, params=SamplingParams(temperature=0.6))
    ...     search.score(nodes, confidence)
    ...     return min(nodes, key=Node.rank)
    """

    branch: Branch  # the prompt
    decode: Callable[[list[int]], str]  # token ids to text
    seed: int = 0
    max_new_tokens: int = 2048  # of any path, stages together
    calibration: Calibration | None = None
    on_event: Callable[[Event], None] = lambda event: None
    eos_token_ids: frozenset[int] = frozenset()
    nodes: list[Node] = field(default_factory=list)
    retraces: list[Retrace] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)
    root: Node = field(init=False)
    _scores: dict[tuple[Scope, tuple[int, ...]], float] = field(default_factory=dict)
    _start: float = field(default_factory=time.perf_counter)

    def __post_init__(self):
        self.root = Node(0, None, None, 0, 0, self.branch)
        self.nodes.append(self.root)

    def can_grow(self, node: Node) -> bool:
        return node.branch.finish is not Finish.EOS and self._tokens_left(node) > 0

    def expand(
        self,
        parents: list[Node],
        n: int,
        stage: Stage | None,
        *,
        params: SamplingParams,
        round: int = 1,
        max_stage_tokens: int | None = None,
    ) -> Generator[list[Expand], list[list[Branch]], list[Node]]:
        """Draw ``n`` candidates of ``stage`` from each parent, each until a stage tag closes, EOS or the limit.

        ``stage`` None draws whole answers, which tags do not end. Returns the new nodes in (parent, index) order.
        """
        requests = [
            Expand(
                parent.branch,
                tuple(candidate_seed(self.seed, stage, round, parent.id, index) for index in range(n)),
                params,
                min(self._tokens_left(parent), max_stage_tokens or self.max_new_tokens),
                stop_at_tags=stage is not None,
            )
            for parent in parents
        ]
        replies = yield requests
        seconds = time.perf_counter() - self._start
        new = []
        for parent, branches in zip(parents, replies):
            for index, branch in enumerate(branches):
                text = self.decode(branch.tokens)
                node = Node(len(self.nodes), parent, stage, round, index, branch, text, seconds=seconds)
                self.nodes.append(node)
                new.append(node)
        return new

    def add(self, branch: Branch, score: float) -> Node:
        """A scored whole answer that the policy put together itself, as a node under the root."""
        seconds, index = time.perf_counter() - self._start, len(self.nodes)
        node = Node(index, self.root, None, 1, index - 1, branch, self.decode(branch.tokens), score, seconds=seconds)
        self.nodes.append(node)
        return node

    def score(self, nodes: list[Node], scorer: Scorer, scope: Scope = "stage") -> None:
        """Give every node the score of its own text, or of its whole path.

        One path of tokens has one score: equal candidates are scored once.
        """
        keys = [(scope, tuple(node.branch.path())) for node in nodes]
        new: dict[tuple, Node] = {}
        for key, node in zip(keys, nodes):
            if key not in self._scores:
                new.setdefault(key, node)
        if new:
            spans = [_span(node.path() if scope == "path" else [node]) for node in new.values()]
            scores = scorer(spans)
            if len(scores) != len(spans):
                raise ValueError(f"scorer must return {len(spans)} scores, one per span, got {len(scores)}")
            self._scores |= {key: -math.inf if math.isnan(s) else float(s) for key, s in zip(new, scores)}
        for key, node in zip(keys, nodes):
            node.score = self._scores[key]

    def keep(
        self,
        nodes: list[Node],
        kept: list[Node],
        *,
        pool: list[Node] | None = None,
        cutoff: float | None = None,
        pass_rank: int = 1,
    ) -> None:
        """Note which of the just sampled ``nodes`` and of older ones the search goes on with.

        ``pool`` is what they were chosen from, by default ``nodes``; its ``pass_rank``-th best closed score was to be
        above ``cutoff``.
        """
        for node in kept:
            node.kept = True
        pool = nodes if pool is None else pool
        ids = [node.id for node in pool], [node.id for node in kept]
        score = ranked_score(pool, pass_rank)
        self.decisions.append(Decision(nodes[0].stage, nodes[0].round, *ids, cutoff, pass_rank, score))
        shown = [Candidate(n.id, n.parent.id, n.text, n.score, n.closed, n in kept) for n in nodes]  # type: ignore
        self.on_event(Candidates(nodes[0].stage, nodes[0].round, tuple(shown)))

    def retrace(
        self, stage: Stage, to: Stage, round: int, *, cutoff: float | None = None, score: float | None = None
    ) -> None:
        """Note that ``stage`` failed, ``score`` not being above ``cutoff``; round ``round`` samples ``to`` again."""
        self.retraces.append(Retrace(stage, to, round, cutoff, score))
        self.on_event(self.retraces[-1])

    def final(self, node: Node) -> None:
        """Note that no retrace can take ``node`` back any more."""
        self.on_event(StageFinal(node.stage, node.text))

    def to_dict(self) -> dict[str, Any]:
        """What the trace has of it."""
        return {
            "nodes": [node.to_dict() for node in self.nodes[1:]],
            "retraces": [{"stage": r.stage, "to": r.to, "round": r.round} for r in self.retraces],  # why: decisions
            "decisions": [asdict(decision) for decision in self.decisions],
        }

    def _tokens_left(self, node: Node) -> int:
        return self.max_new_tokens - (node.branch.length - self.branch.length)


def ranked_score(pool: list[Node], rank: int) -> float | None:
    """The ``rank``-th best score of the closed candidates; None if there are not so many."""
    scores = sorted((node.score for node in pool if node.closed and node.score is not None), reverse=True)
    return scores[rank - 1] if len(scores) >= rank else None


def _span(nodes: list[Node]) -> Span:
    branches = [node.branch for node in nodes]
    return Span(
        text="".join(node.text for node in nodes),
        tokens=[token for branch in branches for token in branch.tokens],
        logprobs=[logprob for branch in branches for logprob in branch.logprobs],
        entropies=[entropy for branch in branches for entropy in branch.entropies],
    )
