"""Greedy decoding: the most likely token, to EOS or the token limit."""

from dataclasses import dataclass
from typing import ClassVar

from llava_cot.core import SamplingParams
from llava_cot.search.sample import Limits
from llava_cot.search.search import Search


@dataclass(frozen=True)
class GreedyConfig(Limits):
    """It has the limits of every search and no settings of its own."""

    samples: ClassVar[bool] = False
    streams_tokens: ClassVar[bool] = True


def greedy(search: Search, config: GreedyConfig):
    (node,) = yield from search.expand([search.root], 1, None, params=SamplingParams(temperature=0.0))
    node.kept = True
    search.final(node)
    return node
