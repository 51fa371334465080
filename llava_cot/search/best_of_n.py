"""Best-of-N: N whole answers, the best by score."""

from dataclasses import dataclass

from llava_cot.scoring import Scorer, resolve_scorer
from llava_cot.search.sample import Decoding
from llava_cot.search.search import Search
from llava_cot.search.tree import Node


@dataclass(frozen=True)
class BestOfNConfig(Decoding):
    n: int = 4
    scorer: str | Scorer = "confidence"

    def __post_init__(self):
        if self.n < 1:
            raise ValueError(f"n must be >= 1, got {self.n}")


def best_of_n(search: Search, config: BestOfNConfig):
    nodes = yield from search.expand([search.root], config.n, None, params=config.params())
    search.score(nodes, resolve_scorer(config.scorer))
    best = min(nodes, key=Node.rank)
    search.keep(nodes, [best])
    search.final(best)
    return best
