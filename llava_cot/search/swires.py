"""SWIRES, stage-wise retracing search (arXiv 2411.10440v6, section 3.2.2 and algorithm 1)."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from llava_cot.scoring import Scorer, resolve_scorer
from llava_cot.search.sample import Decoding
from llava_cot.search.search import Scope, Search, ranked_score
from llava_cot.search.tree import Node
from llava_cot.stages import STAGES, Stage

# InternLM-XComposer2.5-7B-reward on REASONING (appendix D): mean + z * std, z of the 60th percentile
XCOMPOSER_REWARD_CUTOFF = -0.77 + 0.2533 * 2.08


def _stages(summary, caption, reasoning, conclusion) -> dict[str, int]:
    return dict(zip(map(str, STAGES), (summary, caption, reasoning, conclusion)))


@dataclass(frozen=True)
class SwiresConfig(Decoding):
    """The general form by default; ``published``, ``released`` and ``prose`` are the three sources' algorithms.

    A stage is sampled ``candidates[stage]`` times in all, spread evenly over its parents (at least once each), and the
    candidates join the stage's pool. The pool passes when its ``pass_rank``-th best score is above the cutoff: then the
    best ``keep[stage]`` go on and the pool is emptied. Otherwise a new round starts from stage ``retrace[stage]``; a
    stage that is not in ``retrace`` always passes, and so does every stage in the last of ``max_rounds`` rounds.
    """

    candidates: Mapping[str, int] = field(default_factory=lambda: _stages(4, 4, 4, 4))
    keep: Mapping[str, int] = field(default_factory=lambda: _stages(1, 1, 1, 1))
    retrace: Mapping[str, str] = field(
        default_factory=lambda: {
            "SUMMARY": "SUMMARY",
            "CAPTION": "SUMMARY",
            "REASONING": "CAPTION",
            "CONCLUSION": "REASONING",
        }
    )
    pass_rank: int = 1
    max_rounds: int = 3
    cutoff_quantile: float = 0.6  # of the calibrated scores of the stage
    cutoff: float | None = None  # an absolute one instead
    scorer: str | Scorer = "confidence"
    final_scope: Scope = "stage"  # the last pick is by the CONCLUSION's or by the whole text's score
    max_stage_tokens: Mapping[str, int] = field(default_factory=dict)  # cut a stage that does not close by then

    def __post_init__(self):
        for name in ("candidates", "keep", "retrace", "max_stage_tokens"):
            mapping = getattr(self, name)
            unknown = set(mapping) - set(STAGES)
            if unknown:
                raise ValueError(
                    f"{name} must have stages {[str(s) for s in STAGES]} as keys, got {sorted(unknown)[0]!r}"
                )
            low = [stage for stage, count in mapping.items() if name != "retrace" and count < 1]
            if low:
                raise ValueError(f"{name}[{low[0]!r}] must be >= 1, got {mapping[low[0]]}")
        for stage, target in self.retrace.items():
            if target not in STAGES or STAGES.index(target) > STAGES.index(stage):
                raise ValueError(f"retrace[{stage!r}] must be that stage or one before it, got {target!r}")
        for name in ("candidates", "keep"):
            missing = [stage.value for stage in STAGES if stage not in getattr(self, name)]
            if missing:
                raise ValueError(f"{name} must have a number for every stage, got none for {missing[0]!r}")
        if self.pass_rank < 1:
            raise ValueError(f"pass_rank must be >= 1, got {self.pass_rank}")
        if self.max_rounds < 1:
            raise ValueError(f"max_rounds must be >= 1, got {self.max_rounds}")
        if not 0 <= self.cutoff_quantile <= 1:
            raise ValueError(f"cutoff_quantile must be in [0, 1], got {self.cutoff_quantile}")
        if self.final_scope not in ("stage", "path"):
            raise ValueError(f"final_scope must be 'stage' or 'path', got {self.final_scope!r}")

    @classmethod
    def published(cls, **changes) -> "SwiresConfig":
        """arXiv v6 (ICCV), appendix D, algorithm 1."""
        settings = dict(
            candidates=_stages(1, 4, 4, 1),
            keep=_stages(1, 2, 2, 1),
            retrace={"REASONING": "CAPTION"},
            pass_rank=2,
            max_rounds=3,
            cutoff_quantile=0.6,
        )
        return cls(**{**settings, **changes})

    @classmethod
    def released(cls, **changes) -> "SwiresConfig":
        """inference/VLMEvalKit/swires.py of the authors' repository."""
        settings = dict(max_rounds=5, keep=_stages(1, 2, 3, 1), final_scope="path")
        return cls.published(**{**settings, **changes})

    @classmethod
    def prose(cls, **changes) -> "SwiresConfig":
        """arXiv v6, section 3.2.2: one good candidate is enough, and every stage from CAPTION on may retrace."""
        retrace = {"CAPTION": "CAPTION", "REASONING": "CAPTION", "CONCLUSION": "REASONING"}
        return cls.published(**{**dict(retrace=retrace, pass_rank=1, max_rounds=4), **changes})


def passes(pool: list[Node], cutoff: float | None, pass_rank: int) -> bool:
    """Whether the ``pass_rank``-th best closed candidate scores above the cutoff."""
    if cutoff is None:
        return True
    score = ranked_score(pool, pass_rank)
    return score is not None and score > cutoff


def swires(search: Search, config: SwiresConfig):
    scorer = resolve_scorer(config.scorer)
    parents: dict[Stage, list[Node]] = {STAGES[0]: [search.root]}
    pools: dict[Stage, list[Node]] = {stage: [] for stage in STAGES}
    position, round = 0, 1
    while True:
        stage = STAGES[position]
        nodes = yield from search.expand(
            parents[stage],
            max(1, config.candidates[stage] // len(parents[stage])),
            stage,
            params=config.params(),
            round=round,
            max_stage_tokens=config.max_stage_tokens.get(stage),
        )
        search.score(nodes, scorer, config.final_scope if stage is STAGES[-1] else "stage")
        pool = pools[stage]
        pool += nodes
        # The last round has a cutoff too, for the trace alone.
        cutoff = _cutoff(search, config, stage) if stage in config.retrace and config.max_rounds > 1 else None
        if round < config.max_rounds and not passes(pool, cutoff, config.pass_rank):
            search.keep(nodes, [], pool=pool, cutoff=cutoff, pass_rank=config.pass_rank)
            round, position = round + 1, STAGES.index(Stage(config.retrace[stage]))
            score = ranked_score(pool, config.pass_rank)
            search.retrace(stage, STAGES[position], round, cutoff=cutoff, score=score)
            continue
        kept = sorted(pool, key=Node.rank)[: config.keep[stage]]
        pools[stage] = []
        search.keep(nodes, kept, pool=pool, cutoff=cutoff, pass_rank=config.pass_rank)
        growing = [node for node in kept if search.can_grow(node)]
        if stage is STAGES[-1] or not growing:
            for node in kept[0].path():
                search.final(node)
            return kept[0]
        position += 1
        parents[STAGES[position]] = growing


def _cutoff(search: Search, config: SwiresConfig, stage: Stage) -> float | None:
    if config.cutoff is not None:
        return config.cutoff
    return search.calibration.cutoff(stage, config.cutoff_quantile) if search.calibration else None
