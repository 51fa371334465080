"""Stage-level beam search (arXiv 2411.10440v1; the baseline of v6, appendix G): SWIRES that never goes back."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from llava_cot.core import Program
from llava_cot.search.sample import Staged
from llava_cot.search.search import Scope, Search
from llava_cot.search.swires import PerStage, SwiresConfig, swires
from llava_cot.search.tree import Node


@dataclass(frozen=True)
class StageBeamConfig(Staged):
    """Each stage is sampled ``candidates`` times in all, over its parents, and the best ``keep`` by score go on.

    One number holds for every stage, SUMMARY included; a mapping has a number for each. The answer ends with the best
    CONCLUSION.
    """

    candidates: PerStage = 4
    keep: PerStage = 2
    final_scope: Scope = "stage"  # whether CONCLUSIONs compare by their own score or by that of the whole text
    max_stage_tokens: Mapping[str, int] = field(default_factory=dict)  # cut a stage that does not close by then

    def __post_init__(self) -> None:
        super().__post_init__()
        self.to_swires()  # raises if a value is wrong
        for name in ("candidates", "keep", "max_stage_tokens"):
            value = getattr(self, name)
            plain = (
                {stage: int(number) for stage, number in value.items()} if isinstance(value, Mapping) else int(value)
            )
            object.__setattr__(self, name, plain)

    @property
    def max_generations(self) -> int:
        return self.to_swires().max_generations

    def to_swires(self) -> SwiresConfig:
        return SwiresConfig(**{**vars(self), "retrace": {}})


def stage_beam(search: Search, config: StageBeamConfig) -> Program[list[Node]]:
    return swires(search, config.to_swires())
