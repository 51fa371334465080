"""Greedy decoding: the most likely token, to EOS or the token limit."""

from dataclasses import dataclass

from llava_cot.engine.branch import SamplingParams
from llava_cot.search.sample import Limits
from llava_cot.search.search import Search


@dataclass(frozen=True)
class GreedyConfig(Limits):
    pass


def greedy(search: Search, config: GreedyConfig):
    (node,) = yield from search.expand([search.root], 1, None, params=SamplingParams(temperature=0.0))
    node.kept = True
    search.final(node)
    return node
