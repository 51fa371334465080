"""Best-of-N: draw N whole answers and return the one with the best score."""

from dataclasses import dataclass

from llava_cot.core import Program
from llava_cot.scoring import resolve_scorer
from llava_cot.search.sample import Scored
from llava_cot.search.search import Search
from llava_cot.search.tree import Node


@dataclass(frozen=True)
class BestOfNConfig(Scored):
    n: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n < 1:
            raise ValueError(f"n must be >= 1, got {self.n}")

    @property
    def max_generations(self) -> int:
        return self.n


def best_of_n(search: Search, config: BestOfNConfig) -> Program[list[Node]]:
    nodes = yield from search.expand([search.root], config.n, None, params=config.params())
    yield from search.score(nodes, resolve_scorer(config.scorer), "path")
    best = search.best(nodes, config.num_return_sequences)
    search.keep(nodes, best)
    for node in best[0].path():
        search.final(node)
    return best
