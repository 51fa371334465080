"""Greedy decoding: the most likely token, to EOS or the token limit."""

from dataclasses import dataclass
from typing import ClassVar

from llava_cot.core import Program, SamplingParams
from llava_cot.search.sample import Limits
from llava_cot.search.search import Search
from llava_cot.search.tree import Node


@dataclass(frozen=True)
class GreedyConfig(Limits):
    """Greedy decoding has the limits of every search and no settings of its own."""

    samples: ClassVar[bool] = False
    streams_tokens: ClassVar[bool] = True


def greedy(search: Search, config: GreedyConfig) -> Program[Node]:
    (node,) = yield from search.expand([search.root], 1, None, params=SamplingParams(temperature=0.0))
    node.kept = True
    for each in node.path():
        search.final(each)
    return node
