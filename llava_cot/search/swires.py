"""SWIRES, stage-wise retracing search (arXiv 2411.10440v6, section 3.2.2 and algorithm 1)."""

import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from numbers import Real
from types import NoneType
from typing import Any

from llava_cot.core import Program, check_kind, whole_number
from llava_cot.scoring import resolve_scorer
from llava_cot.scoring.scorer import is_groupwise
from llava_cot.search.sample import Staged
from llava_cot.search.search import NEXT, Scope, Search, ranked_score
from llava_cot.search.tree import Node
from llava_cot.stages import LLAVA_COT, Grammar
from llava_cot.text import normalise

# InternLM-XComposer2.5-7B-reward on REASONING (appendix D): mean + z * std, z of the 60th percentile
XCOMPOSER_REWARD_Z = 0.2533
XCOMPOSER_REWARD_CUTOFF = -0.77 + XCOMPOSER_REWARD_Z * 2.08

PerStage = int | Mapping[str, int]


@dataclass(frozen=True)
class SwiresConfig(Staged):
    """The general form by default; ``published``, ``released`` and ``prose`` are the three sources' algorithms.

    A stage is sampled ``candidates[stage]`` times in all, spread evenly over its parents (at least once each), and the
    candidates join the stage's pool. The pool passes when its ``pass_rank``-th best score is above the cutoff: then the
    best ``keep[stage]`` go on and the pool is emptied. Otherwise a new round starts from stage ``retrace[stage]``; a
    stage that is not in ``retrace`` always passes, and so does every stage in the last of ``max_rounds`` rounds. One
    number for ``candidates`` or ``keep`` holds for every stage. The stages are those of the generator's ``grammar``.

    At most one of ``cutoff``, ``cutoff_z`` and ``cutoff_agreement`` takes the place of ``cutoff_quantile``. The last is
    a pass rule of its own: at least this share of the pool must have the same text after ``normalise``.
    """

    candidates: PerStage = 4
    keep: PerStage = 1  # a stage that ends the answer keeps num_return_sequences
    retrace: Mapping[str, str] | None = None  # None: every stage retraces to the one before it, the first to itself
    pass_rank: int = 1
    max_rounds: int = 3
    cutoff_quantile: float = 0.6  # quantile of the calibrated scores of the stage
    cutoff: float | None = None  # an absolute score instead
    cutoff_z: float | None = None  # mean + z * std of the calibrated scores instead
    cutoff_agreement: float | None = None
    accumulate: Collection[str] | None = None  # stages whose pool outlives a retrace; None: all
    accept_after: int | None = None  # draw this many of a stage first, and the rest only if these do not pass
    final_scope: Scope = "stage"  # whether CONCLUSIONs compare by their own score or by that of the whole text
    max_stage_tokens: Mapping[str, int] = field(default_factory=dict)  # cut a stage that does not close by then

    def __post_init__(self) -> None:
        super().__post_init__()
        names = self.grammar.names
        ends = {name for name in names if not self.grammar.follows[name]}
        if self.retrace is None:
            object.__setattr__(self, "retrace", dict(zip(names, (names[0], *names))))
        for name in ("candidates", "keep"):
            if isinstance(getattr(self, name), Real):
                object.__setattr__(self, name, dict.fromkeys(names, getattr(self, name)))
            check_kind(name, getattr(self, name), Mapping, "int or a mapping from stages to numbers")
        check_kind("retrace", self.retrace, Mapping, "a mapping from stages to stages, or None")
        check_kind("max_stage_tokens", self.max_stage_tokens, Mapping, "a mapping from stages to numbers")
        if isinstance(self.accumulate, str) or not isinstance(self.accumulate, (Collection, NoneType)):
            raise TypeError(f"accumulate must be a collection of stages or None, got {self.accumulate!r}")
        for name in ("candidates", "keep", "retrace", "max_stage_tokens", "accumulate"):
            for stage in getattr(self, name) or ():
                if stage not in names:
                    raise ValueError(f"{name} must have stages {[str(s) for s in names]} as keys, got {stage!r}")
        for name in ("candidates", "keep", "max_stage_tokens"):
            numbers = getattr(self, name).items()
            plain = {stage: whole_number(f"{name}[{str(stage)!r}]", number, 1) for stage, number in numbers}
            object.__setattr__(self, name, plain)
        object.__setattr__(self, "keep", {**self.keep, **dict.fromkeys(ends, self.num_return_sequences)})  # type: ignore
        for stage, target in self.retrace.items():  # type: ignore[union-attr]
            if target not in names or names.index(target) > names.index(stage):
                raise ValueError(f"retrace[{stage!r}] must be that stage or one before it, got {target!r}")
        for name in ("candidates", "keep"):
            missing = [str(stage) for stage in names if stage not in getattr(self, name)]
            if missing:
                raise ValueError(f"{name} must have a number for every stage, got none for {missing[0]!r}")
        self._check_numbers()

    def _check_numbers(self) -> None:
        for name in ("pass_rank", "max_rounds", "accept_after"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        for name in ("cutoff_quantile", "cutoff_agreement"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {value}")
        for name in ("cutoff", "cutoff_z"):
            value = getattr(self, name)
            if value is not None and math.isnan(value):
                raise ValueError(f"{name} must be a number or None, got nan")
        given = [n for n in ("cutoff", "cutoff_z", "cutoff_agreement") if getattr(self, n) is not None]
        if len(given) > 1:
            raise ValueError(f"{given[0]} and {given[1]} must not both be given")
        if self.final_scope not in ("stage", "path"):
            raise ValueError(f"final_scope must be 'stage' or 'path', got {self.final_scope!r}")

    @property
    def needs_calibration(self) -> bool:
        is_absolute = self.cutoff is not None or self.cutoff_agreement is not None
        return bool(self.retrace) and self.max_rounds > 1 and not is_absolute

    @property
    def max_generations(self) -> int:
        """The candidates of the costliest run: every round but the last fails at the stage where failing costs most."""
        names, costs = self.grammar.names, [*map(self._width, self.grammar.names)]
        goes_back = [(at, names.index(self.retrace[name])) for at, name in enumerate(names) if name in self.retrace]  # type: ignore
        to_the_end = [sum(costs[start:]) for start in range(len(names))]
        most = to_the_end  # from each stage on, in the rounds that are left
        for _ in range(self.max_rounds - 1):
            most = [
                max([end] + [sum(costs[start : at + 1]) + most[to] for at, to in goes_back if at >= start])
                for start, end in enumerate(to_the_end)
            ]
        return most[0]

    def _width(self, stage: str) -> int:
        """The most candidates that one round draws of a stage: each parent has one at least."""
        follows = self.grammar.follows
        sources = [(1, tuple(self.grammar.allowed([]))), *((self.keep[name], tuple(follows[name])) for name in follows)]  # type: ignore
        widths = [
            max(parents, *(self.candidates[name] for name in names))  # type: ignore[index]
            for parents, names in sources
            if stage in names
        ]
        return max(widths, default=1) * self.grammar.max_visits.get(stage, 1)

    @classmethod
    def published(cls, grammar: Grammar = LLAVA_COT, **changes: object) -> "SwiresConfig":
        """arXiv v6 (ICCV), appendix D, algorithm 1.

        The two stages before the last are sampled, and the second of them retraces to the first. A grammar of two
        stages has only one of them, which retraces to itself.
        """
        middle = grammar.names[-3:-1]
        settings: dict[str, Any] = dict(
            grammar=grammar,
            candidates={name: 4 if name in middle else 1 for name in grammar.names},
            keep={name: 2 if name in middle else 1 for name in grammar.names},
            retrace={middle[-1]: middle[0]} if middle else {},
            pass_rank=2,
            max_rounds=3,
            cutoff_quantile=0.6,
        )
        return cls(**{**settings, **changes})

    @classmethod
    def released(cls, grammar: Grammar = LLAVA_COT, **changes: object) -> "SwiresConfig":
        """inference/VLMEvalKit/swires.py of the authors' repository."""
        keep = {**cls.published(grammar).keep, **dict.fromkeys(grammar.names[-2:-1], 3)}  # type: ignore[dict-item]
        settings: dict[str, Any] = dict(max_rounds=5, keep=keep, final_scope="path")
        return cls.published(grammar, **{**settings, **changes})

    @classmethod
    def prose(cls, grammar: Grammar = LLAVA_COT, **changes: object) -> "SwiresConfig":
        """arXiv v6, section 3.2.2: one good candidate is enough, and every stage from CAPTION on may retrace."""
        names = grammar.names[-3:]
        retrace = dict(zip(names, (names[0], *names)))
        return cls.published(grammar, **{**dict(retrace=retrace, pass_rank=1, max_rounds=4), **changes})


def swires(search: Search, config: SwiresConfig) -> Program[list[Node]]:
    # For each depth, the nodes to sample from, and the candidates that have not passed. Answers may end at any depth.
    parents: list[list[Node]] = [[search.root]]
    pools: list[list[Node]] = [[]]
    ended: list[Node] = []
    round = 1
    while True:
        depth = len(parents) - 1
        pool = pools[depth]
        nodes = yield from _sample(search, config, parents[depth], pool, round)
        stage = min(pool, key=Node.rank).stage
        assert stage is not None and config.retrace is not None
        # The last round has a cutoff too, but only the trace shows it.
        may_retrace = stage in config.retrace and config.max_rounds > 1
        cutoff = _cutoff(search, config, stage) if may_retrace else None
        keep = partial(search.keep, nodes, pool=pool, cutoff=cutoff, pass_rank=config.pass_rank)
        if may_retrace and round < config.max_rounds and not _passes(search, config, pool):
            keep([])
            round += 1
            target = config.retrace[stage]
            depth = _depth_of(search, target, parents)
            pools = [p if _accumulates(config, p) else [] for p in pools]
            del parents[depth + 1 :]
            score = ranked_score(pool, config.pass_rank)
            reason = None if config.cutoff_agreement is None else "too few candidates say the same"
            search.retrace(stage, target, round, cutoff=cutoff, score=score, reason=reason)
            continue
        # Scores of different stages have no common scale, so the good candidates of every stage come first.
        order = sorted(pool, key=lambda node: (not _is_good(search, config, node), node.rank()))
        keep_count = config.keep[stage]  # type: ignore[index]
        kept = order[:keep_count] if search.grammar.follows[stage] else search.best(pool, keep_count)
        pools[depth] = []
        keep(kept)
        growing = [node for node in kept if search.can_grow(node)]
        ended += [node for node in kept if node.closed and not search.allowed(node)]
        if not growing:
            best = search.best(ended or kept, config.num_return_sequences)
            for node in best[0].path():
                search.final(node)
            return best
        parents.append(growing)
        if len(pools) < len(parents):
            pools.append([])


def _sample(
    search: Search, config: SwiresConfig, parents: list[Node], pool: list[Node], round: int
) -> Program[list[Node]]:
    """Sample and score candidates after ``parents`` and add them to ``pool``. With ``accept_after``, the second part is
    drawn only if the first does not pass."""
    stages = {name for parent in parents for name in search.allowed(parent)}
    each = max(1, max(config.candidates[stage] for stage in stages) // len(parents))  # type: ignore[index]
    first = min(each, max(1, config.accept_after // len(parents))) if config.accept_after else each
    limits = [config.max_stage_tokens[stage] for stage in stages if stage in config.max_stage_tokens]
    scorer, new = resolve_scorer(config.scorer), list[Node]()
    for start, stop in ((0, first), (first, each)):
        if start == stop or (start and _passes(search, config, pool)):
            break
        nodes = yield from search.expand(
            parents,
            stop - start,
            NEXT,
            params=config.params(),
            round=round,
            max_stage_tokens=max(limits) if len(limits) == len(stages) else None,
            first_index=start,
        )
        pool += nodes
        new += nodes
        asked = pool if is_groupwise(scorer) else nodes
        for is_end in (False, True):
            group = [n for n in asked if (not search.grammar.follows[n.stage]) == is_end]  # type: ignore[index]
            if group:
                yield from search.score(group, scorer, config.final_scope if is_end else "stage")
    return new


def _passes(search: Search, config: SwiresConfig, pool: list[Node]) -> bool:
    """Whether enough candidates are good enough, each measured by the cutoff of its own stage."""
    if config.cutoff_agreement is not None:
        closed = [node for node in pool if node.closed]
        bodies = [normalise(search.grammar.body(node.text, node.stage)) for node in closed]  # type: ignore
        return max(Counter(bodies).values(), default=0) >= config.cutoff_agreement * len(pool)
    if config.cutoff is None and search.calibration is None:
        return True
    return sum(_is_good(search, config, node) for node in pool) >= config.pass_rank


def _is_good(search: Search, config: SwiresConfig, node: Node) -> bool:
    """Whether ``node`` is closed and above the cutoff of its own stage, if that stage has one."""
    assert node.stage is not None and node.score is not None
    cutoff = _cutoff(search, config, node.stage)
    return node.closed and (cutoff is None or node.score > cutoff)


def _cutoff(search: Search, config: SwiresConfig, stage: str) -> float | None:
    if config.cutoff is not None or config.cutoff_agreement is not None:
        return config.cutoff
    known = search.calibration
    if known is None or (stage not in known.quantiles and stage not in config.retrace):  # type: ignore[operator]
        return None
    if config.cutoff_z is not None:
        return known.z_cutoff(stage, config.cutoff_z)
    return known.cutoff(stage, config.cutoff_quantile)


def _depth_of(search: Search, stage: str, parents: list[list[Node]]) -> int:
    """The deepest place where ``stage`` may be sampled."""
    return max(depth for depth, nodes in enumerate(parents) if any(stage in search.allowed(node) for node in nodes))


def _accumulates(config: SwiresConfig, pool: list[Node]) -> bool:
    return config.accumulate is None or any(node.stage in config.accumulate for node in pool)
