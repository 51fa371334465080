"""Plain sampling: answers under seeds of their own."""

from dataclasses import dataclass

from llava_cot.engine.branch import SamplingParams
from llava_cot.engine.budget import Budget
from llava_cot.search.search import Search


@dataclass(frozen=True)
class Limits:
    """What every search has; ``budget`` None is no limit."""

    max_new_tokens: int = 2048
    budget: Budget | None = None

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be >= 1, got {self.max_new_tokens}")


@dataclass(frozen=True)
class Decoding(Limits):
    """The published decoding of LLaVA-CoT: temperature 0.6, top-p 0.9, 2,048 new tokens.

    ``num_return_sequences`` is how many answers are returned, the best first: those of distinct tokens, so fewer where
    the search found fewer.
    """

    temperature: float = 0.6
    top_k: int = 0
    top_p: float = 0.9
    min_p: float = 0.0
    num_return_sequences: int = 1

    def __post_init__(self):
        super().__post_init__()
        if self.num_return_sequences < 1:
            raise ValueError(f"num_return_sequences must be >= 1, got {self.num_return_sequences}")
        self.params()  # raises what is wrong

    def params(self) -> SamplingParams:
        return SamplingParams(self.temperature, self.top_k, self.top_p, self.min_p)


@dataclass(frozen=True)
class SampleConfig(Decoding):
    """All ``num_return_sequences`` answers are returned, in the order of their seeds, equal ones too."""


def sample(search: Search, config: SampleConfig):
    nodes = yield from search.expand([search.root], config.num_return_sequences, None, params=config.params())
    for node in nodes:
        node.kept = True
        search.final(node)
    return nodes
