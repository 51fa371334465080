"""SWIRES as a policy: which rounds it runs, what it keeps, and where its random numbers come from."""

import math
import random
from statistics import NormalDist

import pytest
from helpers.scripted import Draft, play

from llava_cot.core import Finish
from llava_cot.search import SwiresConfig
from llava_cot.search.events import Candidates, Retrace, StageFinal
from llava_cot.search.swires import swires
from llava_cot.search.tree import candidate_seed

CUTOFF = NormalDist().inv_cdf(0.6)
ALWAYS, NEVER = -math.inf, math.inf
PRESETS = {"published": SwiresConfig.published, "released": SwiresConfig.released, "prose": SwiresConfig.prose}


def run(preset, script=lambda *place: Draft(), *, cutoff=0.5, play_kwargs=None, **settings):
    def config(scorer):
        return preset(scorer=scorer, cutoff=cutoff, **settings)

    return play(swires, config, script, **(play_kwargs or {}))


def places(nodes):
    return [(node.round, node.parent.id, node.index) for node in nodes]


@pytest.mark.parametrize(
    "preset, pass_rates",
    [("published", [52.5, 89.4, 98.0]), ("released", [52.5, 89.4, 98.0]), ("prose", [87.0, 98.3])],
)
def test_pass_rates_with_independent_normal_scores(preset, pass_rates):
    draw = random.Random(0)
    searches, passed = 3000, [0] * 6

    def script(stage, round, parent, index):
        return Draft(score=draw.gauss(0, 1) if stage == "REASONING" else 9.0)

    for _ in range(searches):
        played = run(PRESETS[preset], script, cutoff=CUTOFF)
        rounds = len(played.search.retraces) + 1
        rank = 1 if preset == "prose" else 2
        # The last round goes on whatever its scores are: whether it passed stands in its scores.
        if sorted((node.score for node in played.nodes("REASONING")), reverse=True)[rank - 1] > CUTOFF:
            for enough in range(rounds, len(passed)):
                passed[enough] += 1
    for rounds, percent in enumerate(pass_rates, start=1):
        rate = percent / 100
        tolerance = 3 * math.sqrt(rate * (1 - rate) / searches) + 0.0005  # and the rounding of the expected figure
        assert passed[rounds] / searches == pytest.approx(rate, abs=tolerance)


@pytest.mark.parametrize(
    "preset, cutoff, rounds, generations",
    [
        ("published", ALWAYS, 1, 1 + 8 + 2),
        ("published", NEVER, 3, 1 + 3 * 8 + 2),
        ("released", ALWAYS, 1, 12),
        ("released", NEVER, 5, 44),
        ("prose", ALWAYS, 1, 1 + 8 + 2),
    ],
)
def test_generations_between_always_and_never_passing(preset, cutoff, rounds, generations):
    played = run(PRESETS[preset], cutoff=cutoff)
    assert len(played.nodes()) == generations
    assert [retrace.round for retrace in played.search.retraces] == list(range(2, rounds + 1))


def test_prose_retraces_from_every_stage_but_summary():
    failing = {1: "CAPTION", 2: "REASONING", 3: "CONCLUSION"}

    def script(stage, round, parent, index):
        return Draft(score=0.0 if failing.get(round) == stage else 1.0)

    played = run(SwiresConfig.prose, script)
    assert [(r.stage, r.to, r.round) for r in played.search.retraces] == [
        ("CAPTION", "CAPTION", 2),
        ("REASONING", "CAPTION", 3),
        ("CONCLUSION", "REASONING", 4),
    ]
    assert len(played.nodes("SUMMARY")) == 1
    assert [len(played.nodes("CAPTION", round)) for round in (1, 2, 3, 4)] == [4, 4, 4, 0]
    assert [len(played.nodes("REASONING", round)) for round in (1, 2, 3, 4)] == [0, 4, 4, 4]


def test_reasonings_accumulate_over_rounds_and_captions_do_not():
    def script(stage, round, parent, index):
        if stage == "CAPTION":
            return Draft(score=2.0 if round == 1 else 1.0)  # the first round's captions stay the best ever drawn
        return Draft(score={1: 0.9, 2: 0.8}[round] if (parent, index) == (1, 0) else 0.0)

    played = run(SwiresConfig.published, script)
    assert len(played.search.retraces) == 1  # one good reasoning in each round makes the second-best good
    assert [(node.round, node.score) for node in played.kept("REASONING")] == [(1, 0.9), (2, 0.8)]
    assert {node.parent.round for node in played.nodes("REASONING", 2)} == {2}
    assert [node.parent for node in played.nodes("CONCLUSION")] == played.kept("REASONING")


def test_candidates_are_spread_evenly_over_their_parents():
    played = run(SwiresConfig.released, cutoff=ALWAYS)
    captions, reasonings = played.kept("CAPTION"), played.kept("REASONING")
    assert [node.parent for node in played.nodes("REASONING")] == [captions[0]] * 2 + [captions[1]] * 2
    assert [node.parent for node in played.nodes("CONCLUSION")] == reasonings  # one candidate in all, but one for each


def test_ties_go_to_the_lowest_round_parent_and_index():
    played = run(SwiresConfig.published, cutoff=NEVER)
    assert places(played.kept("CAPTION")) == [(r, 1, i) for r in (1, 2, 3) for i in (0, 1)]
    first_captions = [node.id for node in played.nodes("CAPTION", 1)]
    assert places(played.kept("REASONING")) == [(1, first_captions[0], 0), (1, first_captions[0], 1)]
    assert played.result.parent == played.kept("REASONING")[0]


def test_the_released_pick_is_by_the_whole_text_and_the_published_one_by_the_conclusion():
    for preset, stages in (("published", 1), ("released", 4)):
        played = run(PRESETS[preset], cutoff=ALWAYS)
        assert {len(span.tokens) for span in played.scored[-1]} == {stages}
        assert all(len(span.tokens) == 1 for spans in played.scored[:-1] for span in spans)


def test_equal_candidates_are_scored_once():
    def script(stage, round, parent, index):
        return Draft(token={"SUMMARY": 1, "CAPTION": 10 + index // 2}.get(stage, 20))  # two captions, one reasoning

    played = run(SwiresConfig.published, script, cutoff=NEVER)
    spans = [[span.tokens for span in spans] for spans in played.scored]
    # Later rounds repeat the first. The kept captions are twins: everything below them is one path.
    assert spans == [[[1]], [[10], [11]], [[20]], [[20]]]
    assert all(node.score == 0.0 for node in played.nodes())


@pytest.mark.parametrize("scores", [[0.0, 0.0], [0.0] * 5])
def test_a_wrong_number_of_scores(scores):
    with pytest.raises(ValueError, match=r"scorer must return \d scores, one per span, got \d"):
        run(SwiresConfig.published, play_kwargs={"wrong_scores": scores})


def test_nan_is_the_worst_score():
    def script(stage, round, parent, index):
        return Draft(score=math.nan if index < 3 else -1e30)

    played = run(SwiresConfig, script, cutoff=ALWAYS, retrace={})
    assert all(node.score == -math.inf for node in played.nodes() if node.index < 3)
    assert [node.index for node in played.result.path()] == [3, 3, 3, 3]


@pytest.mark.parametrize("bad", [Draft(9.0, Finish.LENGTH), Draft(9.0, Finish.EOS), Draft(9.0, tag=0)])
def test_what_did_not_close_its_own_stage_ranks_last_and_never_passes(bad):
    def all_but_the_last(stage, round, parent, index):
        return bad if stage == "REASONING" and (round, parent, index) != (3, 1, 1) else Draft(0.1)

    played = run(SwiresConfig.published, all_but_the_last, pass_rank=1)
    assert len(played.search.retraces) == 2  # 9.0 is above the cutoff, and does not count
    assert played.nodes("CONCLUSION")[0].parent.score == 0.1


def test_all_candidates_end_with_eos():
    def script(stage, round, parent, index):
        return Draft(score=index, finish=Finish.EOS if stage == "CAPTION" else Finish.TAG)

    for settings in ({}, {"retrace": {"CAPTION": "SUMMARY"}}):
        played = run(SwiresConfig.published, script, cutoff=NEVER, **settings)
        assert played.result.stage == "CAPTION" and played.result.score == 3
        assert not played.nodes("REASONING")
        assert [event.stage for event in played.events if isinstance(event, StageFinal)] == ["SUMMARY", "CAPTION"]


def test_spent_tokens_end_the_search():
    def script(stage, round, parent, index):
        return Draft(length=40)

    played = run(SwiresConfig.published, script, play_kwargs={"max_new_tokens": 100})
    assert played.result.stage == "REASONING"
    assert len(played.result.path_tokens()) == 100
    assert played.result.finish is Finish.LENGTH
    assert {request.max_new_tokens for request in played.requests} == {100, 60, 20}


def test_a_stage_may_have_a_limit_of_its_own():
    played = run(
        SwiresConfig.published, lambda *place: Draft(length=40), max_stage_tokens={"CAPTION": 7}, cutoff=ALWAYS
    )
    assert {len(node.tokens) for node in played.nodes("CAPTION")} == {7}
    assert {len(node.tokens) for node in played.nodes("REASONING")} == {40}


def test_a_seed_comes_from_its_place_alone():
    def other(stage, round, parent, index):
        return Draft(score=(index * 7 + parent * 3) % 5, length=1 + index)

    first = run(SwiresConfig.released, other, cutoff=NEVER, play_kwargs={"seed": 3})
    second = run(SwiresConfig.released, cutoff=NEVER, play_kwargs={"seed": 3})
    seeds = {}
    for node in [*first.nodes(), *second.nodes()]:
        place = (node.stage, node.round, node.parent.id, node.index)
        assert node.continuation.seed == seeds.setdefault(place, node.continuation.seed) == candidate_seed(3, *place)
        assert 0 <= node.continuation.seed < 2**63
    assert len(set(seeds.values())) == len(seeds) > 44
    assert candidate_seed(4, *place) not in seeds.values()
    assert candidate_seed(0, "SUMMARY", 1, 0, 0) == 3012442571001277317  # published traces depend on it


def test_events_tell_the_story_in_order():
    played = run(SwiresConfig.published, cutoff=NEVER, max_rounds=2)
    story = [type(event).__name__ + ":" + str(event.stage) for event in played.events]
    one_round = ["Candidates:CAPTION", "Candidates:REASONING"]
    assert story == [
        "Candidates:SUMMARY",
        *one_round,
        "Retrace:REASONING",
        *one_round,
        "Candidates:CONCLUSION",
        *(f"StageFinal:{stage}" for stage in ("SUMMARY", "CAPTION", "REASONING", "CONCLUSION")),
    ]
    assert played.events[3] == Retrace("REASONING", "CAPTION", 2)
    failed = played.events[2]
    assert isinstance(failed, Candidates) and not any(candidate.kept for candidate in failed.candidates)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"candidates": {"THOUGHT": 4}}, r"candidates must have stages \['SUMMARY', .*\] as keys, got 'THOUGHT'"),
        ({"max_stage_tokens": {"caption": 4}}, r"max_stage_tokens must have stages .* got 'caption'"),
        ({"candidates": {"CAPTION": 0}}, r"candidates\['CAPTION'\] must be >= 1, got 0"),
        ({"keep": {"CAPTION": -1}}, r"keep\['CAPTION'\] must be >= 1, got -1"),
        ({"keep": {"CAPTION": 1}}, r"keep must have a number for every stage, got none for 'SUMMARY'"),
        (
            {"retrace": {"CAPTION": "REASONING"}},
            r"retrace\['CAPTION'\] must be that stage or one before it, got 'REASO",
        ),
        ({"retrace": {"CAPTION": "START"}}, r"retrace\['CAPTION'\] must be that stage or one before it, got 'START'"),
        ({"pass_rank": 0}, r"pass_rank must be >= 1, got 0"),
        ({"max_rounds": 0}, r"max_rounds must be >= 1, got 0"),
        ({"cutoff_quantile": 1.01}, r"cutoff_quantile must be in \[0, 1\], got 1.01"),
        ({"final_scope": "text"}, r"final_scope must be 'stage' or 'path', got 'text'"),
    ],
)
def test_what_no_configuration_may_say(settings, message):
    with pytest.raises(ValueError, match=message):
        SwiresConfig(**settings)
    with pytest.raises(ValueError, match=message):
        SwiresConfig.released(**settings)
