"""Stage beam: so many candidates a stage, so many go on, and no way back."""

import random
from dataclasses import dataclass

import pytest
from helpers.scripted import Draft, play

from llava_cot.core import Finish
from llava_cot.scoring import Calibration
from llava_cot.search import StageBeamConfig
from llava_cot.search.events import StageFinal
from llava_cot.search.stage_beam import stage_beam
from llava_cot.stages import STAGES


def run(script=lambda *place: Draft(), *, play_kwargs=None, **settings):
    def config(scorer):
        return StageBeamConfig(scorer=scorer, **settings)

    return play(stage_beam, config, script, **(play_kwargs or {}))


def test_four_candidates_and_the_best_two_by_default():
    played = run(lambda stage, round, parent, index: Draft(score=index - parent))
    assert [len(played.nodes(stage)) for stage in STAGES] == [4, 4, 4, 4]
    assert [len(played.kept(stage)) for stage in STAGES] == [2, 2, 2, 1]
    assert sorted(node.index for node in played.kept("SUMMARY")) == [2, 3]
    assert [node.index for node in played.result.path()] == [3, 1, 1, 1]
    assert [event.stage for event in played.events if isinstance(event, StageFinal)] == list(STAGES)


def test_no_score_is_so_low_that_it_goes_back():
    calibration = Calibration("any", "any", {stage.value: [9.0] * 101 for stage in STAGES})
    played = run(play_kwargs={"calibration": calibration})
    assert not played.search.retraces and len(played.nodes()) == 16


def test_numbers_per_stage():
    candidates = {"SUMMARY": 1, "CAPTION": 6, "REASONING": 4, "CONCLUSION": 1}
    played = run(candidates=candidates, keep={"SUMMARY": 1, "CAPTION": 2, "REASONING": 3})
    assert [len(played.nodes(stage)) for stage in STAGES] == [1, 6, 4, 3]  # at least one conclusion each
    assert [len(played.kept(stage)) for stage in STAGES] == [1, 2, 3, 1]


def test_the_last_pick_may_be_by_the_whole_text():
    for scope, tokens in (("stage", 1), ("path", 4)):
        assert {len(span.tokens) for span in run(final_scope=scope).scored[-1]} == {tokens}


def test_equal_candidates_are_scored_once():
    played = run(lambda stage, round, parent, index: Draft(token=STAGES.index(stage)))
    assert [[span.tokens for span in spans] for spans in played.scored] == [[[0]], [[1]], [[2]], [[3]]]


@dataclass
class Beam:
    """A candidate of the plain search."""

    draft: Draft
    number: int  # in the order they were drawn, from 1
    index: int
    parent: "Beam | None"
    closed: bool
    can_grow: bool
    tokens: int  # of its path

    def place(self):
        return not self.closed, -self.draft.score, self.parent.number if self.parent else 0, self.index

    def indices(self):
        return [*(self.parent.indices() if self.parent else []), self.index]


def plain_stage_beam(script, candidates, keep, max_new_tokens):
    """The search, written down again stage by stage. Returns the numbers that were kept, and the answer's path."""
    parents, number, kept = [None], 0, []
    for stage in STAGES:
        drawn = []
        for at, parent in enumerate(parents):
            for index in range(max(1, candidates[stage] // len(parents))):
                draft, number = script(stage, 1, at, index), number + 1
                before = parent.tokens if parent else 0
                tokens = min(before + draft.length, max_new_tokens)
                cut = tokens - before < draft.length
                closed = draft.finish is Finish.TAG and draft.tag is None and not cut
                can_grow = tokens < max_new_tokens and draft.finish is not Finish.EOS
                drawn.append(Beam(draft, number, index, parent, closed, can_grow, tokens))
        best = sorted(drawn, key=Beam.place)[: 1 if stage == "CONCLUSION" else keep[stage]]
        kept += [beam.number for beam in best]
        parents = [beam for beam in best if beam.can_grow]
        if not parents:
            break
    return sorted(kept), best[0].indices()


def test_random_scripts_against_a_plain_loop():
    draw, lengths = random.Random(0), set()
    for case in range(300):
        candidates = {stage.value: draw.randint(1, 7) for stage in STAGES}
        keep = {stage.value: draw.randint(1, 4) for stage in STAGES}
        limit = draw.choice([1000, 1000, 12])
        wild = draw.choice([0.0, 0.0, 0.3, 0.8])

        def script(stage, round, parent, index, case=case, wild=wild):
            own = random.Random(f"{case} {stage} {parent} {index}")
            finish = own.choice([Finish.EOS, Finish.LENGTH, Finish.TAG]) if own.random() < wild else Finish.TAG
            tag = 0 if finish is Finish.TAG and stage != "SUMMARY" and own.random() < wild else None
            return Draft(own.choice([-2.0, -1.0, -0.5, 0.0]), finish, tag, length=own.randint(1, 5))

        played = run(script, candidates=candidates, keep=keep, play_kwargs={"max_new_tokens": limit})
        kept, path = plain_stage_beam(script, candidates, keep, limit)
        assert [node.id for node in played.nodes() if node.kept] == kept, case
        assert [node.index for node in played.result.path()] == path, case
        assert not played.search.retraces
        lengths.add(len(path))
    assert lengths == {1, 2, 3, 4}


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"candidates": 0}, r"candidates\['SUMMARY'\] must be >= 1, got 0"),
        ({"keep": 0}, r"keep\['SUMMARY'\] must be >= 1, got 0"),
        ({"candidates": {"CAPTION": 4}}, "candidates must have a number for every stage, got none for 'SUMMARY'"),
        ({"keep": {"THOUGHT": 4}}, r"keep must have stages \['SUMMARY', .*\] as keys, got 'THOUGHT'"),
        ({"final_scope": "text"}, "final_scope must be 'stage' or 'path', got 'text'"),
    ],
)
def test_what_no_configuration_may_say(settings, message):
    with pytest.raises(ValueError, match=message):
        StageBeamConfig(**settings)
