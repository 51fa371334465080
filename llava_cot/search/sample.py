"""Plain sampling: each answer has a seed of its own. The settings that searches share are here too."""

from dataclasses import dataclass
from typing import ClassVar

from llava_cot.core import Feature, Program, SamplingParams, check_kind, check_kinds
from llava_cot.scoring import Scorer, resolve_scorer
from llava_cot.scoring.scorer import needs_of
from llava_cot.search.budget import Budget
from llava_cot.search.search import Search
from llava_cot.search.tree import Node
from llava_cot.stages import LLAVA_COT, Grammar


@dataclass(frozen=True)
class Limits:
    """The settings that every search has. ``budget`` None is no limit.

    The class attributes are traits of the policy: whether it ``samples`` (transformers' ``do_sample``), whether the
    engine ``draws`` its tokens and so applies the logits processors of the model's generation config, and whether every
    token that it draws stands at once, so that a stream may show it.
    """

    samples: ClassVar[bool] = True
    draws: ClassVar[bool] = True
    streams_tokens: ClassVar[bool] = False

    max_new_tokens: int = 2048
    budget: Budget | None = None

    def __post_init__(self) -> None:
        check_kinds(self)
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be >= 1, got {self.max_new_tokens}")
        check_kind("budget", self.budget, (Budget, type(None)), "a Budget or None")

    @property
    def num_answers(self) -> int:
        """How many answers the search returns at most."""
        return 1

    @property
    def max_generations(self) -> int | None:
        """The most candidates that are drawn for one question; None if only their tokens are bounded."""
        return 1

    @property
    def needs(self) -> frozenset[Feature]:
        """What the back end must be able to do beyond returning text."""
        return frozenset()

    @property
    def needs_calibration(self) -> bool:
        """Whether its thresholds come from a calibration of its scorer."""
        return False


@dataclass(frozen=True)
class Decoding(Limits):
    """The published decoding of LLaVA-CoT: temperature 0.6, top-p 0.9, 2,048 new tokens.

    ``num_return_sequences`` is how many answers are returned, the best first. Answers with equal
    tokens count once, so a search may return fewer.
    """

    temperature: float = 0.6
    top_k: int = 0
    top_p: float = 0.9
    min_p: float = 0.0
    num_return_sequences: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_return_sequences < 1:
            raise ValueError(f"num_return_sequences must be >= 1, got {self.num_return_sequences}")
        self.params()  # raises if a value is wrong

    @property
    def num_answers(self) -> int:
        return self.num_return_sequences

    @property
    def max_generations(self) -> int | None:
        return self.num_return_sequences

    def params(self) -> SamplingParams:
        return SamplingParams(self.temperature, self.top_k, self.top_p, self.min_p)


@dataclass(frozen=True)
class Scored(Decoding):
    """A search that ranks its candidates by the scores of ``scorer``, a name or a callable."""

    scorer: str | Scorer = "confidence"

    def __post_init__(self) -> None:
        super().__post_init__()
        resolve_scorer(self.scorer)  # raises for an unknown name

    @property
    def needs(self) -> frozenset[Feature]:
        return needs_of(resolve_scorer(self.scorer))


@dataclass(frozen=True)
class Staged(Scored):
    """A search that goes stage by stage, in the order that ``grammar`` allows."""

    grammar: Grammar = LLAVA_COT

    def __post_init__(self) -> None:
        super().__post_init__()
        check_kind("grammar", self.grammar, Grammar, "a Grammar")


@dataclass(frozen=True)
class SampleConfig(Decoding):
    """All ``num_return_sequences`` answers are returned, in the order of their seeds, equal ones too."""

    streams_tokens: ClassVar[bool] = True


def sample(search: Search, config: SampleConfig) -> Program[list[Node]]:
    nodes = yield from search.expand([search.root], config.num_return_sequences, None, params=config.params())
    for node in nodes:
        node.kept = True
        for each in node.path():
            search.final(each)
    return nodes
