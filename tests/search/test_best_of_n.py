"""Best-of-N: whole answers from one prompt, the best by score."""

import math

import pytest
from helpers.scripted import Draft, play

from llava_cot.core import Finish
from llava_cot.search import BestOfNConfig
from llava_cot.search.best_of_n import best_of_n
from llava_cot.search.events import StageFinal

END = Finish.EOS


def run(drafts, **settings):
    def config(scorer):
        return BestOfNConfig(n=len(drafts), scorer=scorer, **settings)

    return play(best_of_n, config, lambda stage, round, parent, index: drafts[index])


@pytest.mark.parametrize(
    "drafts, best",
    [
        ([Draft(1, END), Draft(3, END), Draft(2, END)], 1),
        ([Draft(1, END), Draft(1, END), Draft(1, END)], 0),  # a tie
        ([Draft(9, Finish.LENGTH), Draft(1, END), Draft(2, END)], 2),  # an answer that was cut off is the last choice
        ([Draft(1, Finish.LENGTH), Draft(2, Finish.LENGTH)], 1),
        ([Draft(math.nan, END), Draft(-1e30, END)], 1),
        ([Draft(1, END)], 0),
    ],
)
def test_the_best_answer(drafts, best):
    played = run(drafts)
    assert played.result.index == best
    assert [node.index for node in played.nodes() if node.kept] == [best]
    assert [event.text for event in played.events if isinstance(event, StageFinal)] == [played.result.text]


def test_one_request_of_n_whole_answers():
    played = run([Draft(finish=END)] * 3, temperature=0.3, top_p=0.5)
    (request,) = played.requests
    assert len(set(request.seeds)) == 3 and request.stops == frozenset()
    assert (request.params.temperature, request.params.top_p) == (0.3, 0.5)


def test_equal_answers_are_scored_once():
    played = run([Draft(1, END, token=5), Draft(1, END, token=5), Draft(0, END, token=6)])
    assert [[span.tokens for span in spans] for spans in played.scored] == [[[5], [6]]]


def test_n_is_at_least_one():
    with pytest.raises(ValueError, match="n must be >= 1, got 0"):
        BestOfNConfig(n=0)
