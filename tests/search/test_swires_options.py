"""What SWIRES can do beyond its three sources: other cutoffs, pools, targets, early acceptance, several answers."""

import pytest
from helpers.scripted import Draft, play

from llava_cot.scoring import Calibration, groupwise
from llava_cot.search import SwiresConfig
from llava_cot.search.swires import swires
from llava_cot.stages import STAGES


def run(script=lambda *place: Draft(), calibration=None, preset=SwiresConfig.published, **settings):
    def config(scorer):
        return preset(scorer=scorer, **settings)

    return play(swires, config, script, calibration=calibration)


@pytest.mark.parametrize("z, retraces", [(0.0, 0), (1.0, 0), (2.5, 2)])
def test_a_z_score_is_a_cutoff(z, retraces):
    calibration = Calibration.fit("any", "a ramp", {"REASONING": [i / 100 for i in range(101)]})  # 0.5 and 0.29
    played = run(lambda *place: Draft(score=0.9), calibration, cutoff_z=z)
    assert len(played.search.retraces) == retraces


@pytest.mark.parametrize("share, retraces", [(0.5, 0), (0.75, 2)])
def test_agreement_is_a_pass_rule(share, retraces):
    def script(stage, round, parent, index):
        said = ("A cat.", "a cat", "a dog", "a cow")[2 * parent + index] if stage == "REASONING" else str(index)
        return Draft(text=f"<{stage}> {said} </{stage}>")

    played = run(script, cutoff_agreement=share, pass_rank=9)  # pass_rank is of scores
    assert len(played.search.retraces) == retraces


def test_a_pool_that_does_not_accumulate_starts_empty_in_every_round():
    def script(stage, round, parent, index):
        return Draft(score=0.9 if stage == "REASONING" and (parent, index) == (0, 0) else 0.1)

    played = run(script, cutoff=0.5)
    assert len(played.search.retraces) == 1  # one good one in each of two rounds
    played = run(script, cutoff=0.5, accumulate=())
    assert len(played.search.retraces) == 2
    assert {node.round for node in played.kept("REASONING")} == {3}
    assert len(run(script, cutoff=0.5, accumulate=["REASONING"]).search.retraces) == 1


def test_a_retrace_may_go_to_any_earlier_stage():
    def script(stage, round, parent, index):
        return Draft(score=float(round > 1 or stage != "CONCLUSION"))

    played = run(script, cutoff=0.5, retrace={"CONCLUSION": "SUMMARY"}, pass_rank=1)
    assert [(r.stage, r.to) for r in played.search.retraces] == [("CONCLUSION", "SUMMARY")]
    assert [len(played.nodes(stage, 2)) for stage in STAGES] == [1, 4, 4, 2]


def test_early_acceptance_draws_the_rest_only_if_it_must():
    def script(stage, round, parent, index):
        return Draft(score=1.0 if index == 1 else 0.0)

    preset = {"preset": SwiresConfig, "cutoff": 0.5, "retrace": {"CAPTION": "CAPTION"}, "candidates": 6}
    played = run(script, accept_after=2, **preset)
    assert [len(played.nodes(stage)) for stage in STAGES] == [2, 2, 2, 2]
    played = run(script, accept_after=1, **preset)
    assert [len(played.nodes(stage)) for stage in STAGES] == [6, 6, 6, 6]  # the first one does not pass
    assert [node.index for node in played.nodes("CAPTION")] == [0, 1, 2, 3, 4, 5]
    played, whole = run(accept_after=1, **preset), run(**preset)
    assert [node.continuation.seed for node in played.nodes()] == [node.continuation.seed for node in whole.nodes()]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_best_distinct_answers(count):
    def script(stage, round, parent, index):
        return Draft(score=index / 10, token=None if stage != "CONCLUSION" else index // 2)

    def config(scorer):
        return SwiresConfig(scorer=scorer, cutoff=0.0, candidates=6, num_return_sequences=count)

    search = play(swires, config, script).search
    kept = [node for node in search.nodes if node.kept and node.stage == "CONCLUSION"]
    assert len(kept) == min(count, 3)

    def policy(search, config):
        found.extend((yield from swires(search, config)))
        return found

    found = []
    play(policy, config, script)
    tokens = [tuple(node.path_tokens()) for node in found]
    assert len(set(tokens)) == len(tokens) == min(count, 3)  # three distinct conclusions were drawn
    assert [node.score for node in found] == sorted((node.score for node in found), reverse=True)


def test_a_scorer_of_pools_sees_the_whole_pool_again():
    sizes = []

    @groupwise
    def counting(spans):
        sizes.append(len(spans))
        return [0.0] * len(spans)

    play(swires, lambda scorer: SwiresConfig.published(scorer=counting, cutoff=0.5), lambda *place: Draft())
    assert sizes == [1, *(4, 4), *(4, 8), *(4, 12), 2]  # captions pass, reasonings of three rounds come together


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"cutoff": 0.1, "cutoff_z": 0.2}, "cutoff and cutoff_z must not both be given"),
        ({"cutoff_agreement": 1.5}, r"cutoff_agreement must be in \[0, 1\], got 1.5"),
        ({"accept_after": 0}, "accept_after must be >= 1, got 0"),
        ({"accumulate": ["THOUGHT"]}, r"accumulate must have stages \['SUMMARY', .*\] as keys, got 'THOUGHT'"),
        ({"num_return_sequences": 0}, "num_return_sequences must be >= 1, got 0"),
        ({"temperature": -0.1}, "temperature must be >= 0, got -0.1"),
    ],
)
def test_what_no_configuration_may_say(settings, message):
    with pytest.raises(ValueError, match=message):
        SwiresConfig(**settings)
