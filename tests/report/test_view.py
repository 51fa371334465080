"""What both views read out of a trace, and what the search has to write into it for them."""

import json
import math

import pytest
from helpers.scripted import Draft, play
from helpers.traces import LOOP, loop, run, sentences, spent, trace_of, two_retraces

from llava_cot.core import Finish
from llava_cot.report.numbers import number
from llava_cot.report.view import read
from llava_cot.search import SwiresConfig
from llava_cot.search.budget import Budget
from llava_cot.search.events import Retrace
from llava_cot.search.swires import swires
from llava_cot.trace import parse_trace


def test_two_retraces_and_why():
    shown = read(two_retraces())
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
    shown = read(two_retraces())
    summary, reasoning = (shown.headings.index(stage) for stage in ("SUMMARY", "REASONING"))
    pool = shown.pools[3, reasoning]
    assert pool.carried == shown.cells[1, reasoning] and len(pool.carried) == 4
    late = [card for card in shown.cards.values() if card.kept_in]
    assert [(card.round, card.kept_in, card.score) for card in late] == [(1, 3, 0.7)]
    assert "is above" in pool.verdict and shown.pools[1, summary].verdict == ""


def test_the_accounts_add_up():
    trace = two_retraces()
    shown = read(trace)
    assert sum(account.tokens for account in shown.accounts) == shown.generated
    assert sum(account.path for account in shown.accounts) == shown.path == 1 + 2 + 3 + 1
    assert shown.wasted == pytest.approx(1 - shown.path / shown.generated)
    seconds = sum(account.drawing + account.scoring for account in shown.accounts)
    assert seconds == pytest.approx(trace.data["events"][-1]["seconds"])


def test_seconds_of_drawing_and_of_scoring_are_told_apart():
    data = json.loads(two_retraces().to_json())
    for second, event in enumerate(data["events"]):
        event["seconds"] = second**2  # every interval is another one
    kinds = [event["event"] for event in data["events"]]
    gaps = [0, *(2 * at - 1 for at in range(1, len(kinds)))]
    accounts = read(parse_trace(data)).accounts
    scoring = sum(gap for gap, kind in zip(gaps, kinds) if kind == "scored")
    assert sum(account.scoring for account in accounts) == scoring
    assert sum(account.drawing for account in accounts) == sum(gaps) - scoring


def test_tokens_that_are_no_candidates_have_a_line():
    data = json.loads(two_retraces().to_json())
    data["usage"]["generated_tokens"] += 100  # of a judge, say
    shown = read(parse_trace(data))
    assert (shown.accounts[-1].name, shown.accounts[-1].tokens) == ("outside the tree", 100)
    assert sum(account.tokens for account in shown.accounts) == shown.generated


def test_the_last_round_goes_on_and_says_so():
    played = play(swires, lambda scorer: SwiresConfig(scorer=scorer, cutoff=math.inf, max_rounds=2), lambda *p: Draft())
    shown = read(trace_of(played))
    assert [r.to for r in shown.retraces] == ["SUMMARY"]
    for column in range(len(shown.headings)):
        assert shown.pools[2, column].verdict.endswith("is not above the cutoff ∞; it goes on with what it has")


def test_too_few_closed_candidates_are_a_reason_of_their_own():
    def script(stage, round, parent, index):
        return Draft(finish=Finish.LENGTH if stage == "CAPTION" and index else Finish.TAG)

    played = play(
        swires,
        lambda scorer: SwiresConfig(scorer=scorer, cutoff=-math.inf, pass_rank=2, max_rounds=2, retrace=GO_BACK),
        script,
    )
    (retrace,) = read(trace_of(played)).retraces
    assert retrace.reason == "1 of 4 candidates closed, 2 must score above the cutoff −∞"


GO_BACK = {"CAPTION": "CAPTION"}


@pytest.mark.parametrize("reserve", [0, 0.3])
@pytest.mark.parametrize("tokens", range(13, 60, 3))
def test_a_retrace_points_at_its_stage_wherever_the_budget_ends(tokens, reserve):
    def script(stage, round, parent, index):
        return Draft(-0.4 if stage == "REASONING" else 0.9 - index / 10)

    budget = Budget(generated_tokens=tokens, reserve=reserve)
    shown = read(trace_of(run(swires, lambda scorer: SwiresConfig(scorer=scorer, cutoff=0.5), script, budget=budget)))
    assert shown.retraces
    assert {(retrace.to, retrace.start, retrace.end) for retrace in shown.retraces} == {("CAPTION", 2, 1)}


def test_a_watcher_is_told_too():
    played = play(
        swires, lambda scorer: SwiresConfig(scorer=scorer, cutoff=0.5, max_rounds=2), lambda *place: Draft(0.25)
    )
    (event,) = (event for event in played.events if isinstance(event, Retrace))
    assert (event.cutoff, event.score) == (0.5, 0.25)


def test_a_stage_that_a_path_visits_twice_has_two_columns():
    shown = read(loop())
    assert shown.headings == ["PLAN · step 1", "LOOK · step 2", "PLAN · step 3", "SAY · step 4"]
    assert all(card.column > shown.cards[card.parent].column for card in shown.cards.values() if card.parent)
    (retrace,) = shown.retraces
    assert (retrace.stage, retrace.to, retrace.start, retrace.end) == ("PLAN · step 3", "PLAN · step 3", 2, 2)
    assert (shown.answer, [(card.id, answer) for card, answer in shown.others]) == ("0", [(18, "1")])
    assert shown.path == 5 and shown.malformed is None


def test_stages_that_take_one_anothers_place_share_a_column():
    def script(stage, round, parent, index):
        plan, look, say = range(3)
        return Draft(
            1.0 - index, tag={"SUMMARY": plan, "CAPTION": say if index else look, "REASONING": plan}.get(stage, say)
        )

    played = run(swires, lambda scorer: SwiresConfig(scorer=scorer, grammar=LOOP, cutoff=0.0), script, grammar=LOOP)
    shown = read(trace_of(played))
    assert shown.headings[:2] == ["PLAN · step 1", "LOOK / SAY · step 2"]
    assert {shown.stage_of(card) for card in shown.cells[1, 1]} == {"LOOK", "SAY"}
    assert {shown.stage_of(card) for card in shown.cells[1, 0]} == {""}


def test_what_a_spent_budget_left():
    shown = read(spent())
    assert shown.headings == ["SUMMARY", "CAPTION", "REASONING", "FINISHED GREEDILY"]
    assert shown.spent.endswith("scorer calls: 8 of 10; #13 is what was finished greedily")
    data = json.loads(spent().to_json())
    data["events"] = [e for e in data["events"] if e.get("nodes") != [13] or e["event"] == "accepted"]
    data["config"] = {}
    shown = read(parse_trace(data))
    assert shown.headings[-1] == "ANSWERS" and shown.spent.endswith("scorer calls: 8; #13 is the best so far")


def test_sentences_are_parts_of_answers():
    shown = read(sentences())
    assert shown.headings == ["PARTS OF ANSWERS"] and shown.rounds == [*range(1, 8)]
    assert shown.pools[3, 0].carried == [shown.cards[6]] and shown.cards[6].kept_in == 7
    assert shown.malformed == "CONCLUSION is missing"


@pytest.mark.parametrize(
    "text, malformed",
    [
        ("<CONCLUSION> 4 </CONCLUSION>", None),
        ("<CONCLUSION> 4", "CONCLUSION is unclosed"),
        ("<CONCLUSION> 4 </CONCLUSION> <CONCLUSION> 5 </CONCLUSION>", "CONCLUSION is repeated"),
        ("<CAPTION> a <CONCLUSION> 4 </CONCLUSION>", "<CONCLUSION> opens inside CAPTION"),
        ("</CAPTION> <CONCLUSION> 4 </CONCLUSION>", "</CAPTION> closes what is not open"),
        ("", "CONCLUSION is missing"),
    ],
)
def test_what_is_wrong_with_an_answer(text, malformed):
    data = json.loads(sentences().to_json())
    for node in data["nodes"]:
        node["text"] = text if node["id"] == data["answer"] else ""
    assert read(parse_trace(data)).malformed == malformed


def test_an_agreement_that_was_not_reached_is_a_reason():
    data = json.loads(two_retraces().to_json())
    data["config"] = {"cutoff_agreement": 0.75}
    for event in data["events"]:
        event |= {"cutoff": None}
    assert [r.reason for r in read(parse_trace(data)).retraces] == [
        "fewer than 75% of the 4 candidates say the same"
    ] * 2
    data["config"] = {}
    assert [r.reason for r in read(parse_trace(data)).retraces] == ["not above the cutoff"] * 2


def test_a_violation_on_the_way_to_the_answer_is_malformed_and_one_that_was_stopped_is_not():
    data = json.loads(spent().to_json())
    data["nodes"][4] |= {"closed": False, "finish": "stopped"}  # the greedy rest has closed it
    assert read(parse_trace(data)).malformed is None and read(parse_trace(data)).cards[5].flaw == "unclosed (stopped)"
    data["nodes"][4]["violation"] = "after SUMMARY comes CAPTION, got </REASONING>"
    assert read(parse_trace(data)).malformed == "#5: after SUMMARY comes CAPTION, got </REASONING>"
    data["nodes"][5]["violation"], data["nodes"][4]["violation"] = "not on the path", None
    assert read(parse_trace(data)).malformed is None


@pytest.mark.parametrize("value, shown", [(None, "–"), (math.inf, "∞"), (-math.inf, "−∞"), (-0.1234, "−0.123")])
def test_numbers(value, shown):
    assert number(value) == shown
