"""Many clients at once, some of which go away or are hostile: the others' answers are as if they had been alone."""

import asyncio

import pytest
from helpers.load import asks, faults, hostile_bodies, load, twins
from helpers.serving import serving

CLIENTS, LEAVING, HOSTILE = 36, 6, 6


@pytest.fixture(scope="module")
def expected(tiny):
    return twins(tiny, asks(CLIENTS))


@pytest.mark.parametrize("places", [CLIENTS + HOSTILE, 8])
def test_a_load_disturbs_no_answer_and_leaves_nothing(expected, places):
    with serving("--limit", f"max_queue={places}") as served:
        outcome = asyncio.run(load(served.url, asks(CLIENTS), LEAVING, hostile_bodies(HOSTILE)))
        served.assert_nothing_held()
        assert not [line for line in served.lines if "Traceback" in line]
    assert faults(outcome, asks(CLIENTS), expected) == []
    assert outcome.gone and outcome.refused.total() == HOSTILE
    assert (outcome.waited > 0) == (places < CLIENTS)
