"""What both views read out of a trace, and what the search has to write into it for them."""

import json
import math

import pytest
from helpers.scripted import Draft, play
from helpers.traces import trace_of, two_retraces

from llava_cot.engine.branch import Finish
from llava_cot.report import view
from llava_cot.report.view import number, read
from llava_cot.search import SwiresConfig
from llava_cot.search.events import Retrace
from llava_cot.search.swires import swires
from llava_cot.search.tree import TRACE_VERSION


def test_it_reads_the_version_that_is_written():
    assert view.TRACE_VERSION == TRACE_VERSION


def test_two_retraces_and_why():
    shown = read(two_retraces().data)
    assert [(r.headline, r.reason) for r in shown.retraces] == [
        (
            "REASONING failed in round 1: back to CAPTION, round 2",
            "the second best score −0.400 (the best is 0.700) is not above the cutoff 0.500",
        ),
        (
            "CAPTION failed in round 2: back to CAPTION, round 3",
            "the second best score 0.000 (the best is 0.000) is not above the cutoff 0.500",
        ),
    ]


def test_what_was_carried_over_and_kept_later():
    shown = read(two_retraces().data)
    pool = shown.pools[3, "REASONING"]
    assert pool.carried == shown.cells[1, "REASONING"] and len(pool.carried) == 4
    late = [card for card in shown.cards.values() if card.kept_in]
    assert [(card.round, card.kept_in, card.score) for card in late] == [(1, 3, 0.7)]
    assert "is above" in pool.verdict and shown.pools[1, "SUMMARY"].verdict == "no cutoff"


def test_the_accounts_add_up():
    trace = two_retraces()
    shown = read(trace.data)
    assert sum(account.tokens for account in shown.accounts) == shown.generated
    assert sum(account.path for account in shown.accounts) == shown.path == 1 + 2 + 3 + 1
    assert shown.wasted == pytest.approx(1 - shown.path / shown.generated)
    assert sum(account.seconds for account in shown.accounts) == pytest.approx(trace.data["nodes"][-1]["seconds"])


def test_the_last_round_goes_on_and_says_so():
    played = play(swires, lambda scorer: SwiresConfig(scorer=scorer, cutoff=math.inf, max_rounds=2), lambda *p: Draft())
    shown = read(trace_of(played).data)
    assert [r.to for r in shown.retraces] == ["SUMMARY"]
    for stage in shown.stages:
        assert shown.pools[2, stage].verdict.endswith("is not above the cutoff ∞; it goes on with what it has")


def test_too_few_closed_candidates_are_a_reason_of_their_own():
    def script(stage, round, parent, index):
        return Draft(finish=Finish.LENGTH if stage == "CAPTION" and index else Finish.TAG)

    played = play(
        swires,
        lambda scorer: SwiresConfig(scorer=scorer, cutoff=-math.inf, pass_rank=2, max_rounds=2, retrace=GO_BACK),
        script,
    )
    (retrace,) = read(trace_of(played).data).retraces
    assert retrace.reason == "1 of 4 candidates closed, 2 must score above the cutoff −∞"


GO_BACK = {"CAPTION": "CAPTION"}


def test_a_watcher_is_told_too():
    played = play(
        swires, lambda scorer: SwiresConfig(scorer=scorer, cutoff=0.5, max_rounds=2), lambda *place: Draft(0.25)
    )
    (event,) = (event for event in played.events if isinstance(event, Retrace))
    assert (event.cutoff, event.score) == (0.5, 0.25)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"version": 1}, "trace must be a search's trace of version 3, got version 1"),
        ({"nodes": None}, "trace must be a whole trace, got one with TypeError"),
        ({"nodes": [{"id": 1}]}, "trace must be a whole trace, got one with KeyError: 'logprobs'"),
        ({"usage": {}}, "trace must be a whole trace, got one with KeyError: 'generated_tokens'"),
    ],
)
def test_what_is_not_a_trace(change, message):
    with pytest.raises(ValueError, match=message):
        read({**two_retraces().data, **change})
    with pytest.raises(ValueError, match="got version None"):
        read([])


def test_a_cycle_is_not_a_path():
    data = json.loads(two_retraces().to_json())
    data["nodes"][0]["parent"] = data["answer"]
    with pytest.raises(ValueError, match="node 1 is older than its parent"):
        read(data)


@pytest.mark.parametrize("value, shown", [(None, "–"), (math.inf, "∞"), (-math.inf, "−∞"), (-0.1234, "−0.123")])
def test_numbers(value, shown):
    assert number(value) == shown
