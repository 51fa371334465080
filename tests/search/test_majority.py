"""Majority vote: which conclusion wins, which of its answers is returned, and who votes."""

import math
import random

import pytest
from helpers.scripted import Draft, play

from llava_cot.core import Finish
from llava_cot.search import MajorityConfig
from llava_cot.search.events import Candidates, StageFinal
from llava_cot.search.majority import majority

END = Finish.EOS


def run(drafts, **settings):
    def config(scorer):
        return MajorityConfig(n=len(drafts), scorer=scorer, **settings)

    return play(majority, config, lambda stage, round, parent, index: drafts[index])


def said(conclusion, score=0.0, finish=END, **kwargs):
    return Draft(score, finish, text=f"<REASONING> 1 </REASONING> <CONCLUSION> {conclusion} </CONCLUSION>", **kwargs)


def unclosed(conclusion, score=0.0):
    return Draft(score, Finish.LENGTH, text=f"<CONCLUSION> {conclusion}")


@pytest.mark.parametrize(
    "drafts, best",
    [
        ([said("3", 9), said("4", 1), said("4", 2)], 2),  # the best of the winners, not of all
        ([said("Four.", 1), said("3", 9), said(" four", 0)], 0),
        ([said("1,000"), said("1"), said("1000.0", 1)], 2),
        ([said("3", 1), said("4", 2), said("3", 0), said("4", 0)], 1),  # a tie: the group with the best member
        ([said("3"), said("4")], 0),
        ([said("4", 5, Finish.LENGTH), said("4", 1), said("3", 9)], 1),  # cut off, but behind its conclusion
        ([said("4", math.nan), said("4", -1e30)], 1),
        ([said("3")], 0),
        ([unclosed("4", 9), unclosed("4", 9), said("3")], 2),  # no complete conclusion, no vote
        ([said("", 9), said(" ", 9), said("3")], 2),
        ([Draft(9, END, text="4"), Draft(9, END, text="4"), said("3")], 2),
        ([said("4"), Draft(1, END, text="<CONCLUSION>3</CONCLUSION><CONCLUSION>3</CONCLUSION>")], 0),
        ([unclosed("4", 9), unclosed("3", 0), unclosed("3", 1)], 2),  # unless nobody has one
        ([Draft(0, END, text="4"), Draft(1, END, text="3")], 1),
    ],
)  # fmt: skip
def test_the_most_frequent_conclusion(drafts, best):
    played = run(drafts)
    assert played.result.index == best
    assert [node.index for node in played.nodes() if node.kept] == [best]
    assert [event.text for event in played.events if isinstance(event, StageFinal)] == [played.result.text]
    (shown,) = [event for event in played.events if isinstance(event, Candidates)]
    assert [c.score for c in shown.candidates] == [node.score for node in played.nodes()]


def test_a_vote_may_weigh_its_confidence():
    drafts = [said("3", logprob=-2.0), said("4", logprob=-0.5, length=7), said("3", logprob=-2.0)]
    assert run(drafts).result.index == 0
    assert run(drafts, weight="confidence").result.index == 1  # exp(-0.5) > 2 exp(-2), whatever its length


@pytest.mark.parametrize("keep_fraction, best", [(1.0, 2), (0.6, 2), (0.4, 0), (0.01, 0)])
def test_only_the_most_confident_may_vote(keep_fraction, best):
    drafts = [said("3", 5), said("4", 3), said("4", 4), said("6", 2), said("7", 1)]
    assert run(drafts, keep_fraction=keep_fraction).result.index == best


def test_a_fraction_is_of_those_who_have_a_vote():
    drafts = [Draft(9, END, text="no tags")] * 4 + [said("3", 0), said("3", 1), said("4", 2), said("4", 3)]
    assert run(drafts, keep_fraction=0.25).result.index == 7
    drafts[-1] = said("5", 3)
    assert run(drafts, keep_fraction=0.75).result.index == 7  # three votes, a tie
    assert run(drafts).result.index == 5


def test_one_request_of_n_whole_answers():
    played = run([said("3")] * 3, temperature=0.3, top_p=0.5)
    (request,) = played.requests
    assert len(set(request.seeds)) == 3 and request.stops == frozenset()
    assert (request.params.temperature, request.params.top_p) == (0.3, 0.5)


def test_equal_answers_are_scored_once_and_vote_each():
    played = run([said("4", 1, token=6), said("3", token=5), said("3", token=5)])
    assert [[span.tokens for span in spans] for spans in played.scored] == [[[6], [5]]]
    assert played.result.index == 1


# Conclusions that mean the same, and what is no complete conclusion of any meaning
MEANINGS = [["4", "4.0", " 4. "], ["1,000", "1000", "1000.00"], ["B", "(B)", "b. a cat"], ["yes", "Yes", "YES!"]]


def plain_majority(drafts, meanings, weight, keep_fraction):
    """For every voter counts those who agree; a meaning is (which one, whether the conclusion is complete)."""

    def place(i):
        score = -math.inf if math.isnan(drafts[i].score) else drafts[i].score
        return drafts[i].finish != END, -score, i

    everyone = sorted(range(len(drafts)), key=place)
    voters = [i for i in everyone if meanings[i][1]] or everyone
    voters = voters[: max(1, round(keep_fraction * len(voters)))]
    best, most = None, 0.0
    for candidate in voters:  # in order of rank: who is seen first wins a tie
        agreeing = [i for i in voters if meanings[i][0] == meanings[candidate][0]]
        votes = len(agreeing) if weight == "count" else math.fsum(math.exp(drafts[i].logprob) for i in agreeing)
        if votes > most:
            best, most = candidate, votes
    return best


@pytest.mark.parametrize("weight", ["count", "confidence"])
def test_random_scripts_against_a_plain_count(weight):
    draw, winners = random.Random(weight), set()
    for case in range(300):
        pool, complete = [], draw.choice([0.0, 0.5, 0.9])
        for token in range(draw.randint(1, 8)):
            meaning = draw.randrange(len(MEANINGS))
            answer = said(draw.choice(MEANINGS[meaning]), token=token)
            answer.score = draw.choice([-2.0, -1.0, -0.5, 0.0, math.nan])
            answer.finish = draw.choice([END, END, Finish.LENGTH])
            answer.logprob = draw.choice([-3.0, -1.5, -1.0, -0.1])
            is_complete = draw.random() < complete
            if not is_complete:
                cut = answer.text.removesuffix("</CONCLUSION>")
                meaning, answer.text = draw.choice([(meaning, cut), (meaning, 2 * answer.text), (None, "no tags")])
            pool.append((answer, (meaning, is_complete)))
        drafts, meanings = zip(*draw.choices(pool, k=draw.randint(1, 9)))  # some of them twice
        keep_fraction = draw.choice([1.0, 0.75, 0.5, 0.3, 0.1])
        played = run(drafts, weight=weight, keep_fraction=keep_fraction)
        assert played.result.index == plain_majority(drafts, meanings, weight, keep_fraction), case
        winners.add(played.result.index)
    assert len(winners) > 5


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"n": 0}, "n must be >= 1, got 0"),
        ({"weight": "score"}, "weight must be 'count' or 'confidence', got 'score'"),
        ({"keep_fraction": 0.0}, r"keep_fraction must be in \(0, 1\], got 0.0"),
        ({"keep_fraction": 1.5}, r"keep_fraction must be in \(0, 1\], got 1.5"),
        ({"keep_fraction": math.nan}, r"keep_fraction must be in \(0, 1\], got nan"),
    ],
)
def test_what_no_configuration_may_say(settings, message):
    with pytest.raises(ValueError, match=message):
        MajorityConfig(**settings)
