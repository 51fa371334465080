"""Majority vote over the conclusions of whole answers: self-consistency (Wang et al. 2022, arXiv 2203.11171)."""

import math
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from llava_cot.core import Feature, Program
from llava_cot.scoring import resolve_scorer
from llava_cot.search.sample import Scored
from llava_cot.search.search import Search
from llava_cot.search.tree import Node
from llava_cot.stages import Outcome
from llava_cot.text import normalise


@dataclass(frozen=True)
class MajorityConfig(Scored):
    """``n`` whole answers vote for their conclusions, as ``normalise`` spells them; the best answer of the winners by
    score is returned, then those of the runners-up for ``num_return_sequences``.

    Ties go to the conclusion whose best answer ranks first. An answer without a complete conclusion has no vote, unless
    none has one: then each votes for what stands there.
    """

    n: int = 8
    weight: Literal["count", "confidence"] = "count"  # one vote counts 1, or exp(mean log-prob) of its answer
    keep_fraction: float = 1.0  # share of the voters, the best by score, whose votes count (DeepConf, arXiv 2508.15260)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n < 1:
            raise ValueError(f"n must be >= 1, got {self.n}")
        if self.weight not in ("count", "confidence"):
            raise ValueError(f"weight must be 'count' or 'confidence', got {self.weight!r}")
        if not 0 < self.keep_fraction <= 1:
            raise ValueError(f"keep_fraction must be in (0, 1], got {self.keep_fraction}")

    @property
    def max_generations(self) -> int:
        return self.n

    @property
    def needs(self) -> frozenset[Feature]:
        return super().needs | ({Feature.LOGPROBS} if self.weight == "confidence" else set())


def majority(search: Search, config: MajorityConfig) -> Program[list[Node]]:
    nodes = yield from search.expand([search.root], config.n, None, params=config.params())
    yield from search.score(nodes, resolve_scorer(config.scorer), "path")
    grammar = search.grammar
    conclusions = {node: grammar.parse(node.path_text(), ended=node.closed)[grammar.conclusion] for node in nodes}
    complete = [node for node, stage in conclusions.items() if stage.outcome is Outcome.COMPLETE and stage.text]
    voters = sorted(complete or nodes, key=Node.rank)
    votes: dict[str, list[Node]] = {}
    for node in voters[: max(1, round(config.keep_fraction * len(voters)))]:
        votes.setdefault(normalise(conclusions[node].text), []).append(node)
    # Groups and their members are in order of rank, and sorting leaves equals in their order.
    groups = sorted(votes.values(), key=lambda group: -_weight(group, config))
    best = [group[0] for group in groups][: config.num_return_sequences]
    search.keep(nodes, best)
    for node in best[0].path():
        search.final(node)
    return best


def _weight(group: list[Node], config: MajorityConfig) -> float:
    if config.weight == "count":
        return len(group)
    return math.fsum(math.exp(fmean(logprob for each in node.path() for logprob in each.logprobs)) for node in group)
