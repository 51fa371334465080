"""Grammars other than the four stages: loops, choices, other tags, and what leaves them."""

import json

import pytest
from helpers.scripted import Draft, play

from llava_cot import EngineConfig, SwiresGenerator
from llava_cot.core import Finish
from llava_cot.scoring import Calibration
from llava_cot.search import StageBeamConfig, SwiresConfig
from llava_cot.search.stage_beam import stage_beam
from llava_cot.search.swires import swires
from llava_cot.stages import LLAVA_COT, Grammar, Outcome

LOOP = Grammar(
    {"OBSERVE": ["REASON"], "REASON": ["OBSERVE", "ANSWER"], "ANSWER": []}, max_visits={"OBSERVE": 3, "REASON": 3}
)
CHOICE = Grammar({"PLAN": ["LOOK", "RECALL"], "LOOK": ["ANSWER"], "RECALL": ["ANSWER"], "ANSWER": []})
LOOP_TEXT = "<OBSERVE> a </OBSERVE><REASON> b </REASON><OBSERVE> c </OBSERVE><REASON> d </REASON><ANSWER> 4 </ANSWER>"


def run(grammar, script, policy=swires, config_type=SwiresConfig, **settings):
    def config(scorer):
        return config_type(scorer=scorer, grammar=grammar, **settings)

    return play(policy, config, script, grammar=grammar)


def stages(played):
    return [node.stage for node in played.result.path()]


def test_a_loop_is_left_when_the_model_leaves_it():
    """Observe, reason, observe again: the best candidate decides."""
    told = []

    def script(stage, round, parent, index):
        told.append(stage)
        again = len(told) <= 8  # the first REASON of each candidate wants another look
        if stage == "OBSERVE|ANSWER":
            return Draft(score=index, closes="OBSERVE" if again or index < 3 else "ANSWER")
        return Draft(score=index, closes=stage)

    played = run(LOOP, script, retrace={})
    assert stages(played) == ["OBSERVE", "REASON", "ANSWER"]
    assert set(told) == {"OBSERVE", "REASON", "OBSERVE|ANSWER"}

    def look_again(stage, round, parent, index):
        return Draft(score=index, closes=stage.split("|")[0])  # always OBSERVE, until only ANSWER is left

    played = run(LOOP, look_again, retrace={})
    assert stages(played) == ["OBSERVE", "REASON"] * 3 + ["ANSWER"]
    assert all(node.closed and node.violation is None for node in played.nodes())


def test_the_model_chooses_the_stage():
    def script(stage, round, parent, index):
        if stage == "LOOK|RECALL":
            return Draft(score={0: 0.1, 1: 0.9}.get(index, 0.0), closes="RECALL" if index == 1 else "LOOK")
        return Draft(score=0.5, closes=stage)

    played = run(CHOICE, script, retrace={}, keep=1)
    assert stages(played) == ["PLAN", "RECALL", "ANSWER"]
    both = run(CHOICE, script, retrace={}, keep={"PLAN": 1, "LOOK": 2, "RECALL": 2})
    assert [node.stage for node in both.nodes() if node.kept] == ["PLAN", "LOOK", "RECALL", "ANSWER"]
    assert {node.parent.stage for node in both.nodes("ANSWER")} == {"LOOK", "RECALL"}


def test_every_candidate_is_measured_by_its_own_stage():
    """The pool of a choice passes by the cutoffs of the stages that its candidates chose."""
    calibration = Calibration("any", "any", {"PLAN": [0.0] * 101, "LOOK": [0.5] * 101, "RECALL": [0.1] * 101})
    scores = {"LOOK": 0.3, "RECALL": 0.2}

    def script(stage, round, parent, index):
        chosen = ("LOOK" if round == 1 else "RECALL") if "|" in stage else stage
        return Draft(score=scores.get(chosen, 1.0), closes=chosen)

    def config(scorer):
        return SwiresConfig(scorer=scorer, grammar=CHOICE, retrace={"LOOK": "PLAN", "RECALL": "PLAN"})

    played = play(swires, config, script, calibration=calibration, grammar=CHOICE)
    assert [(r.stage, r.to) for r in played.search.retraces] == [("LOOK", "PLAN")]
    assert stages(played) == ["PLAN", "RECALL", "ANSWER"]


def test_an_answer_may_end_at_several_depths():
    grammar = Grammar({"PLAN": ["THINK", "ANSWER"], "THINK": ["ANSWER"], "ANSWER": []})

    def script(stage, round, parent, index):
        if stage == "THINK|ANSWER":
            return Draft(score=0.9 if index == 0 else 0.4, closes="ANSWER" if index == 0 else "THINK")
        return Draft(score=0.5, closes=stage)

    assert stages(run(grammar, script, retrace={}, keep=1)) == ["PLAN", "ANSWER"]
    assert stages(run(grammar, script, retrace={}, keep=2)) == ["PLAN", "ANSWER"]  # 0.9 stays better than 0.5


@pytest.mark.parametrize(
    "draft, message",
    [
        (Draft(closes="REASON"), "after OBSERVE comes REASON, got"),
        (Draft(closes="ANSWER"), "after OBSERVE comes REASON, got </ANSWER>"),
        (Draft(finish=Finish.EOS), "after OBSERVE comes REASON, got the end (eos)"),
        (Draft(finish=Finish.LENGTH), "after OBSERVE comes REASON, got the end (length)"),
    ],
)
def test_what_leaves_the_grammar_is_named_and_ranks_last(draft, message):
    def script(stage, round, parent, index):
        if stage == "REASON" and index == 0:
            draft.score = 9.0
            return draft
        return Draft(score=0.1, closes=stage.split("|")[-1])

    played = run(LOOP, script, retrace={})
    odd = next(node for node in played.nodes() if node.score == 9.0)
    if draft.closes == "REASON":
        assert odd.violation is None
    else:
        assert odd.violation == message and not odd.closed
        assert odd not in played.result.path() and played.search.to_dict()["nodes"][odd.id - 1]["violation"] == message


def test_stage_beam_of_another_grammar():
    played = run(LOOP, lambda *place: Draft(closes=place[0].split("|")[-1]), stage_beam, StageBeamConfig)
    assert stages(played) == ["OBSERVE", "REASON", "ANSWER"]
    assert [len(played.nodes(stage)) for stage in LOOP.names] == [4, 4, 4]


def test_retraces_go_to_the_last_place_of_a_stage():
    def script(stage, round, parent, index):
        chosen = stage.split("|")[0 if round == 1 else -1]
        return Draft(score=0.0 if chosen == "ANSWER" and round < 3 else 1.0, closes=chosen)

    played = run(LOOP, script, cutoff=0.5, max_rounds=4, retrace={"ANSWER": "OBSERVE"})
    assert [(r.stage, r.to, r.round) for r in played.search.retraces] == [
        ("ANSWER", "OBSERVE", 2),
        ("ANSWER", "OBSERVE", 3),
    ]
    assert {len(node.path()) for node in played.nodes(round=2)} >= {5}  # the third look, not the first


def test_parsing_a_loop():
    parsed = LOOP.parse(LOOP_TEXT)
    assert [(stage.text, stage.outcome) for stage in parsed.values()] == [
        ("c", Outcome.COMPLETE),
        ("d", Outcome.COMPLETE),
        ("4", Outcome.COMPLETE),
    ]
    assert LOOP.conclusion == "ANSWER" and LOOP.violation(LOOP_TEXT) is None


@pytest.mark.parametrize(
    "text, message",
    [
        ("<REASON> b </REASON>", "first comes OBSERVE, got <REASON>"),
        ("<OBSERVE> a <REASON>", "<REASON> opens inside OBSERVE"),
        ("<OBSERVE> a </REASON>", "</REASON> closes what is not open: OBSERVE is"),
        ("a </OBSERVE>", "</OBSERVE> closes what is not open"),
        ("<OBSERVE> a", "OBSERVE is not closed"),
        ("<OBSERVE> a </OBSERVE>", "after OBSERVE comes REASON, got the end"),
        ("<OBSERVE> a </OBSERVE><REASON></REASON>", "after REASON comes OBSERVE or ANSWER, got the end"),
        (LOOP_TEXT + "<OBSERVE>", "after ANSWER comes nothing, got <OBSERVE>"),
        ("", "first comes OBSERVE, got the end"),
    ],
)
def test_violations(text, message):
    assert LOOP.violation(text) == message


def test_the_four_stages_are_a_grammar():
    assert LLAVA_COT.names == ("SUMMARY", "CAPTION", "REASONING", "CONCLUSION")
    assert LLAVA_COT.allowed([]) == ("SUMMARY",) and LLAVA_COT.allowed(["SUMMARY"]) == ("CAPTION",)
    assert LLAVA_COT.allowed(LLAVA_COT.names) == () and LLAVA_COT.conclusion == "CONCLUSION"


@pytest.mark.parametrize("grammar", [LOOP, CHOICE, LLAVA_COT])
def test_a_grammar_as_json(grammar):
    again = Grammar(**json.loads(json.dumps(grammar.to_dict())))
    assert again.to_dict() == grammar.to_dict() and again.conclusion == grammar.conclusion
    for path in ([], ["OBSERVE"], ["OBSERVE", "REASON"] * 3, ["PLAN"]):
        if set(path) <= set(grammar.names):
            assert again.allowed(path) == grammar.allowed(path)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"follows": {}}, "follows must have at least one stage, got none"),
        ({"follows": {"A": ["B"]}}, r"follows\['A'\] must name stages of \['A'\], got 'B'"),
        ({"follows": {"A": "B", "B": []}}, r"follows\['A'\] must be a sequence of stages, got 'B'"),
        ({"follows": {"A": ["A"]}}, "follows must lead from every stage to one without followers, got none from 'A'"),
        ({"follows": {"A": []}, "start": ["B"]}, r"start must name stages of \['A'\], got 'B'"),
        ({"follows": {"A": []}, "max_visits": {"A": 0}}, r"max_visits\['A'\] must be >= 1, got 0"),
        ({"follows": {"A": []}, "tags": {"A": ("<a>", "<a>")}}, "tags must be distinct, got"),
    ],
)
def test_what_no_grammar_may_say(arguments, message):
    with pytest.raises(ValueError, match=message):
        Grammar(**arguments)


def test_other_tags_on_the_real_model(tiny):
    """The tiny model writes four stages; a grammar that merges two of them is one it can follow."""
    from llava_cot.data import shapes

    names = {"SUMMARY": "PLAN", "CAPTION": "LOOK", "REASONING": "THINK", "CONCLUSION": "SAY"}
    grammar = Grammar.sequence(*names.values(), tags={new: (f"<{old}>", f"</{old}>") for old, new in names.items()})
    generator = SwiresGenerator(tiny.model, tiny.processor, grammar=grammar, engine=EngineConfig(page_size=4))
    sample = shapes.sample(802_000)
    mine = generator.answer(sample.image, sample.question, "stage_beam", max_new_tokens=160)
    assert mine.conclusion == mine.stages["SAY"].text and mine.violation is None
    assert [stage.outcome for stage in mine.stages.values()] == [Outcome.COMPLETE] * 4
    assert mine.trace.data["grammar"]["tags"]["LOOK"] == ["<CAPTION>", "</CAPTION>"]

    disordered = Grammar.sequence("CAPTION", "SUMMARY", "CONCLUSION")  # not what it writes
    generator = SwiresGenerator(tiny.model, tiny.processor, grammar=disordered, engine=EngineConfig(page_size=4))
    answer = generator.answer(sample.image, sample.question, "stage_beam", max_new_tokens=160)
    assert answer.violation == "first comes CAPTION, got <SUMMARY>"
    assert answer.trace.data["nodes"][0]["violation"] == "first comes CAPTION, got </SUMMARY>"
    with pytest.raises(ValueError, match="grammar must be the generator's"):
        generator.answer(sample.image, sample.question, SwiresConfig(cutoff=0.0))
    assert generator.engine.pages_in_use == 0


@pytest.mark.parametrize("names", [("A", "A"), ("A", "B", "A"), (*LLAVA_COT.names, "SUMMARY")])
def test_a_sequence_has_each_stage_once(names):
    with pytest.raises(ValueError, match=r"names must be different, got \["):
        Grammar.sequence(*names)
