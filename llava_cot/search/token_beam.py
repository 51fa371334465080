"""Token beam search: the ``num_beams`` most likely continuations, token by token, as in transformers."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

from llava_cot.core import Continuation, Extend, Feature, Finish, Program, Release
from llava_cot.search.sample import Limits
from llava_cot.search.search import Search
from llava_cot.search.tree import Node

MAX_LENGTH_PENALTY = 50  # a million tokens to this power are a finite float64


@dataclass(frozen=True)
class TokenBeamConfig(Limits):
    """Names, defaults and meaning are those of transformers' ``GenerationConfig``. The answer is the best beam."""

    samples: ClassVar[bool] = False
    draws: ClassVar[bool] = False

    num_beams: int = 4
    length_penalty: float = 1.0  # a hypothesis scores its log-prob over length ** length_penalty
    early_stopping: bool | Literal["never"] = False
    num_return_sequences: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_beams < 1:
            raise ValueError(f"num_beams must be >= 1, got {self.num_beams}")
        if not 1 <= self.num_return_sequences <= self.num_beams:
            raise ValueError(
                f"num_return_sequences must be in [1, num_beams={self.num_beams}], got {self.num_return_sequences}"
            )
        if not math.isfinite(self.length_penalty):
            raise ValueError(f"length_penalty must be finite, got {self.length_penalty}")
        if abs(self.length_penalty) > MAX_LENGTH_PENALTY:
            most = MAX_LENGTH_PENALTY
            raise ValueError(f"length_penalty must be in [-{most}, {most}], got {self.length_penalty}")
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise ValueError(f"early_stopping must be True, False or 'never', got {self.early_stopping!r}")

    @property
    def num_answers(self) -> int:
        return self.num_return_sequences

    @property
    def max_generations(self) -> int:
        return self.num_beams

    @property
    def needs(self) -> frozenset[Feature]:
        return frozenset({Feature.EXTEND, Feature.TOKEN_IDS})


class _Beam(NamedTuple):
    """A running beam. ``tokens`` are all that it has drawn, and ``score`` is the sum of their log-probs in nats."""

    score: float
    last: Continuation  # its ``top`` has the tokens that may come next
    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()


class _Step(NamedTuple):
    """A beam and one more token. ``score`` is the log-prob of both in nats."""

    score: float
    beam: int
    token: int
    logprob: float


def token_beam(search: Search, config: TokenBeamConfig) -> Program[list[Node]]:
    eos, num_beams = search.eos_token_ids, config.num_beams
    width = max(2, 1 + len(eos)) * num_beams  # enough that num_beams go on, whichever of them end
    ((root,),) = yield [Extend(search.root.id, top=width)]
    beams = [_Beam(0.0, root)]
    hypotheses: list[tuple[float, Continuation]] = []
    for length in range(1, config.max_new_tokens + 1):
        steps = [
            _Step(beam.score + logprob, index, token, logprob)
            for index, beam in enumerate(beams)
            for token, logprob in beam.last.top
        ]
        steps = sorted(steps, key=lambda step: (-step.score, step.beam, step.token))[:width]
        spent = search.spent()  # then the best beams so far are the answers
        is_last = length == config.max_new_tokens or spent is not None
        for step in steps[:num_beams]:  # the others only take the places of beams that end
            if is_last or step.token in eos:
                finish = Finish.EOS if step.token in eos else Finish.LENGTH
                whole = search.forge(*_longer(beams[step.beam], step), finish)
                hypotheses.append((step.score / length**config.length_penalty, whole))
        hypotheses = sorted(hypotheses, key=lambda scored: -scored[0])[:num_beams]
        steps = [step for step in steps if step.token not in eos][:num_beams]
        if is_last or not steps or not _can_improve(steps[0].score, length, hypotheses, config):
            break
        *replies, _ = yield [
            *(Extend(beams[step.beam].last.id, (step.token,), top=width, generated=True) for step in steps),
            Release(tuple(beam.last.id for beam in beams)),
        ]
        beams = [_Beam(step.score, last, *_longer(beams[step.beam], step)) for step, (last,) in zip(steps, replies)]
    if spent:
        search.note("budget_spent", what=spent, spent=getattr(search.usage, spent))
    nodes = [search.add(whole, score) for score, whole in hypotheses]
    best = nodes[: config.num_return_sequences]
    search.keep(nodes, best)
    for node in best:
        search.final(node)
    return best


def _longer(beam: _Beam, step: _Step) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """The tokens and log-probs of a beam after one more step."""
    return (*beam.tokens, step.token), (*beam.logprobs, step.logprob)


def _can_improve(
    best: float, length: int, hypotheses: list[tuple[float, Continuation]], config: TokenBeamConfig
) -> bool:
    """transformers' heuristic: may the best running beam, at this length or the longest, beat the worst hypothesis?"""
    if len(hypotheses) < config.num_beams:
        return True
    if config.early_stopping is True:
        return False
    hopeful = config.early_stopping == "never" and config.length_penalty > 0
    return best / (config.max_new_tokens if hopeful else length) ** config.length_penalty > hypotheses[-1][0]
