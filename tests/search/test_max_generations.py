"""The upper bound of a search's candidates, which is printed before a benchmark is run."""

import random

import pytest
from helpers.scripted import Draft, play

from llava_cot.search import (
    BestOfNConfig,
    GreedyConfig,
    MajorityConfig,
    SampleConfig,
    SentenceBeamConfig,
    StageBeamConfig,
    SwiresConfig,
    TokenBeamConfig,
)
from llava_cot.search.swires import swires
from llava_cot.stages import STAGES


@pytest.mark.parametrize(
    "config, bound",
    [
        (GreedyConfig(), 1),
        (SampleConfig(num_return_sequences=3), 3),
        (BestOfNConfig(n=5), 5),
        (MajorityConfig(n=7), 7),
        (TokenBeamConfig(num_beams=4), 4),
        (SentenceBeamConfig(), None),
        (StageBeamConfig(candidates=4, keep=2), 16),
        (SwiresConfig.published(), 27),
        (SwiresConfig.released(), 44),
        (SwiresConfig.published(max_rounds=1), 11),
        (SwiresConfig(max_rounds=10_000), 4 * (10_000 - 1) * 2 + 16),  # each round fails at the second stage of two
    ],
)
def test_known_bounds(config, bound):
    assert config.max_generations == bound


def test_no_search_draws_more():
    draw, closest = random.Random(0), 1.0
    for _ in range(300):
        candidates = {str(stage): draw.randint(1, 5) for stage in STAGES}
        keep = {str(stage): draw.randint(1, 5) for stage in STAGES}
        names = [str(stage) for stage in STAGES]
        retrace = {name: draw.choice(names[: at + 1]) for at, name in enumerate(names) if draw.random() < 0.7}
        settings = dict(candidates=candidates, keep=keep, retrace=retrace, max_rounds=draw.randint(1, 4))
        failing = draw.choice([0.0, 0.3, 1.0])  # how many candidates are not good enough

        def script(stage, round, parent, index, failing=failing):
            return Draft(score=0.0 if draw.random() < failing else 1.0)

        def config(scorer, settings=settings):
            return SwiresConfig(scorer=scorer, cutoff=0.5, **settings)

        drawn = len(play(swires, config, script).nodes())
        bound = SwiresConfig(cutoff=0.5, **settings).max_generations
        assert drawn <= bound
        closest = min(closest, 1 - drawn / bound)
    assert closest == 0.0  # it is reached
