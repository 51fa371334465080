"""Sentence beam: the best few continuations, sentence by sentence."""

import random

import pytest
from helpers.scripted import ScriptedBackend

from llava_cot.core import Continuation, Finish
from llava_cot.data import shapes
from llava_cot.search import SentenceBeamConfig
from llava_cot.search.drive import Drive
from llava_cot.search.search import SENTENCE_ENDS, Search
from llava_cot.search.sentence_beam import sentence_beam

SAMPLE = shapes.sample(802_000)
SENTENCE = 4  # the number of the first tag behind those of the four stages


def drawn(case, path, index):
    """What the script has for a place: (score, finish, length)."""
    own = random.Random(f"{case} {path} {index}")
    finish = own.choice([Finish.TAG] * 5 + [Finish.EOS, Finish.LENGTH])
    return own.choice([-2.0, -1.0, -0.5, 0.0]), finish, own.randint(1, 4)


def play(case, config_of, limit):
    """The policy on a script: a piece's token names its path."""
    tokens, scores, paths = iter(range(1000, 10_000)), {}, {None: ()}

    def scorer(spans):
        return [scores[span.tokens[-1]] for span in spans]

    def draw(session, request, at, index) -> Continuation:
        parent = session.by_id[request.parent]
        path = paths[parent.tokens[-1] if parent.tokens else None]
        score, finish, length = drawn(case, path, index)
        taken, token = min(length, request.max_new_tokens), next(tokens)
        finish = Finish.LENGTH if taken < length else finish
        scores[token], paths[token] = score, (*path, index)
        tag = SENTENCE if finish is Finish.TAG else -1
        return Continuation(-1, request.parent, (token,) * taken, finish=finish, tag=tag)

    search = Search(session := ScriptedBackend().open(draw), str, max_new_tokens=limit)
    drive = Drive(session, sentence_beam(search, config_of(scorer)))
    if drive.error:
        raise drive.error
    return search, drive.result[0]


def plain_sentence_beam(case, candidates, keep, limit):
    """The search, written down again: the path of the answer and the number of rounds."""
    beams, ended, rounds = [((), 0, 0)], [], 0  # (path, tokens, number of the node)
    number = 0
    while beams:
        rounds += 1
        pool = list(ended)
        for path, tokens, parent in beams:
            for index in range(max(1, candidates // len(beams))):
                score, finish, length = drawn(case, path, index)
                number += 1
                taken = min(length, limit - tokens)
                cut = taken < length
                closed = not cut and finish in (Finish.TAG, Finish.EOS)
                grows = (cut or finish is not Finish.EOS) and tokens + taken < limit
                pool.append(
                    ((not closed, -score, rounds, parent, index), (*path, index), tokens + taken, number, grows)
                )
        kept = sorted(pool)[:keep]
        beams = [(path, tokens, number) for _, path, tokens, number, grows in kept if grows]
        ended = [entry for entry in kept if not entry[-1]]
    return min(ended)[1], rounds


def test_random_scripts_against_a_plain_loop():
    draw, depths = random.Random(1), set()
    for case in range(200):
        candidates, keep, limit = draw.randint(1, 6), draw.randint(1, 3), draw.choice([8, 20, 60])
        search, best = play(
            case, lambda scorer, c=candidates, k=keep: SentenceBeamConfig(candidates=c, keep=k, scorer=scorer), limit
        )
        path, rounds = plain_sentence_beam(case, candidates, keep, limit)
        assert tuple(node.index for node in best.path()) == path, case
        assert max(node.round for node in search.nodes) == rounds
        depths.add(len(path))
    assert len(depths) > 5


def test_one_greedy_beam_is_greedy(tiny):
    """Every sentence end is a place where a token may be taken back: the text must not notice."""
    samples = [shapes.sample(seed) for seed in range(802_000, 802_010)]
    images, questions = [s.image for s in samples], [s.question for s in samples]
    greedy = tiny.answer_batch(images, questions, "greedy", max_new_tokens=160)
    settings = {"candidates": 1, "keep": 1, "temperature": 0.0, "max_new_tokens": 160}
    answers = tiny.answer_batch(images, questions, "sentence_beam", **settings)
    for expected, answer in zip(greedy, answers, strict=True):
        assert answer.tokens == expected.tokens
        pieces = [node["text"] for node in answer.trace.data["nodes"]]
        assert len(pieces) > 5 and "".join(pieces) == answer.text
        # A piece ends at most one token behind its full stop, or with a tag, or with the answer.
        assert all(p.rstrip().endswith((".", "?", "!", ">")) for p in pieces[:-1])
    assert tiny.engine.pages_in_use == 0


def test_the_tags_of_sentences_come_after_those_of_stages(tiny):
    assert len(tiny.engine.tags.tags) == SENTENCE + len(SENTENCE_ENDS)


def test_several_answers(tiny):
    answer = tiny.answer(SAMPLE.image, SAMPLE.question, "sentence_beam", num_return_sequences=2, max_new_tokens=160)
    assert 1 <= len(answer.trace.data["answers"]) <= 2


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"candidates": 0}, "candidates must be >= 1, got 0"),
        ({"keep": 0}, "keep must be >= 1, got 0"),
        ({"scope": "text"}, "scope must be 'stage' or 'path', got 'text'"),
        ({"temperature": -1.0}, "temperature must be >= 0, got -1.0"),
    ],
)
def test_what_no_configuration_may_say(settings, message):
    with pytest.raises(ValueError, match=message):
        SentenceBeamConfig(**settings)
