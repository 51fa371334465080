"""Where pages run out, keys and values are given up and computed again; what was drawn or scored stays."""

from itertools import takewhile

import pytest
import torch
from helpers.jobs import Job, run, steps
from helpers.random_mllama import random_inputs

from llava_cot.core import Call, Expand, Extend, Finish, Release, SamplingParams
from llava_cot.engine import runner
from llava_cot.engine.config import EngineConfig
from llava_cot.engine.engine import Engine
from llava_cot.prompt import split_rows
from llava_cot_kernels import OutOfPages
from llava_cot_kernels.stage_tags import StageTags

WILD = SamplingParams(temperature=1.2)
NO_TAG: frozenset[int] = frozenset()
PROMPT = 11
TAGS = StageTags([b"a", b"b</", b"x>", b"</x", b">c"] * 20, ["</x>"])


def shared(one, other):
    """With how many equal tokens two siblings begin: these are computed once, and share pages."""
    return len([*takewhile(lambda pair: pair[0] == pair[1], zip(one, other))])


@pytest.fixture
def make_engine(random_model):
    def make(num_pages=2000, page_size=1):
        config = EngineConfig(page_size=page_size, num_pages=num_pages, draft_tokens=0, canary=True)
        return Engine(random_model, TAGS, config=config)

    return make


@pytest.fixture
def ask(random_model):
    def job_of(program, seed=0):
        return Job(
            split_rows(random_inputs(random_model, length=PROMPT, ratio_id=6, seed=seed), random_model.config)[0],
            program,
        )

    return job_of


def stages(counts, widths, seed=0, seen=None):
    """Candidates of candidates: the first of each stage goes on; at the end the last stage but one is drawn again."""

    def program(root):
        calls = []
        path, drawn = [root], []
        for stage, (count, width) in enumerate(zip(counts, widths)):
            seeds = tuple(range(seed + 100 * stage, seed + 100 * stage + width))
            kids, scores = yield [
                Expand(path[-1].id, seeds, WILD, count, NO_TAG),
                Call(lambda items: calls.append(items) or items, [stage]),
            ]
            assert list(scores) == [stage]
            drawn += kids
            path.append(kids[0])
        loser = drawn[-1 - widths[-1]]  # it did not go on
        again, (given,) = yield [Expand(path[-2].id, (seed + 9,), WILD, 5, NO_TAG), Extend(loser.id, (5, 6, 7))]
        (last,) = yield [Expand(given.id, (seed + 10,), WILD, 4, NO_TAG)]
        assert len(calls) == len(counts)
        return [*drawn, *again, given, *last]

    return program


def growing(tokens):
    def program(root):
        yield [Expand(root.id, (1,), WILD, tokens, NO_TAG)]

    return program


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert (one.tokens, one.finish, one.length) == (other.tokens, other.finish, other.length)
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def assert_nothing_held(engine):
    assert (engine.pages_in_use, engine.pool.num_sequences, engine.images_in_use) == (0, 0, 0)


@pytest.mark.parametrize("page_size", [1, 4])
def test_one_search_in_the_pages_of_what_grows(make_engine, ask, page_size):
    """Candidates that do not go on make room, and come back when they are asked for."""
    program = stages((12, 12, 12), (6, 6, 6))
    roomy = make_engine(page_size=page_size)
    run(roomy, [expected := ask(program)])
    assert expected.error is None and expected.usage.recomputed_tokens == 0
    needed = -(-(PROMPT + 24) // page_size) + 6 * (12 // page_size + 1) + 1
    assert needed < 0.7 * roomy.runner.peak_pages
    tight = make_engine(needed, page_size)
    run(tight, [found := ask(program)])
    assert found.error is None
    assert_same(found.result, expected.result)
    assert found.usage.recomputed_tokens > 0
    for name in ("prompt_tokens", "decoded_tokens", "generated_tokens", "image_encodings", "steps"):
        assert getattr(found.usage, name) == getattr(expected.usage, name), name
    assert_nothing_held(tight)
    tight = make_engine(needed // 2, page_size)
    run(tight, [hopeless := ask(program)])
    assert isinstance(hopeless.error, OutOfPages) and hopeless.result is None
    assert_nothing_held(tight)


@pytest.mark.parametrize("share", [0.35, 0.5, 0.8])
@pytest.mark.parametrize("steps_per_look", [1, 4])
def test_searches_pause_and_go_on(make_engine, ask, random_model, share, steps_per_look):
    """Each program begins once, whatever happens to its pages."""
    started = []

    def counted(seed):
        program = stages((9, 14, 8), (4, 3, 5), 1000 * seed)

        def run(root):
            started.append(seed)
            return (yield from program(root))

        return run

    roomy = make_engine()
    expected = [ask(counted(seed), seed) for seed in range(5)]
    run(roomy, expected)
    started.clear()
    num_pages = int(share * roomy.runner.peak_pages)
    config = EngineConfig(page_size=1, num_pages=num_pages, steps_per_look=steps_per_look, canary=True)
    crowded = Engine(random_model, TAGS, config=config)
    found = [ask(counted(seed), seed) for seed in range(5)]
    paused = set()
    for _ in steps(crowded, found):
        paused |= {index for index, job in enumerate(found) if job.was_paused}
        held = sum(branch.seq >= 0 for job in found for branch in job.branches)
        assert crowded.pool.num_sequences == held
    assert [job.error for job in found] == [None] * 5 and sorted(started) == list(range(5))
    assert (paused or share == 0.8) and 0 not in paused  # never the oldest
    for one, other in zip(found, expected):
        assert_same(one.result, other.result)
    assert sum(job.usage.recomputed_tokens for job in found) > 0
    assert_nothing_held(crowded)


def beams(width, shared, own, started):
    """Token by token: one path of ``shared`` tokens, and from its end ``width`` of ``own`` tokens."""

    def longer(parents, count=1):
        """The ``count`` most likely next tokens of each of ``parents``, which are released."""
        extensions = [Extend(b.id, (token,), top=width, generated=True) for b in parents for token in [*b.top][:count]]
        return [*extensions, Release(tuple(b.id for b in parents if b.parent is not None))]

    def program(root):
        started.append(root)
        ((path,),) = yield [Extend(root.id, top=width)]
        for _ in range(shared):
            (path,), _ = yield longer([path])
        *replies, _ = yield longer([path], width)
        for _ in range(own):
            *replies, _ = yield longer([path for (path,) in replies])
        return [path.path() for (path,) in replies]

    return program


def test_beams_share_what_they_shared_when_they_are_back(make_engine, ask):
    """Their common path was released token by token; it is recomputed once, and they go on where they were."""
    started, roomy = [], make_engine()
    run(roomy, [expected := ask(beams(6, 20, 10, started))])
    needed = roomy.runner.peak_pages
    assert expected.error is None and needed < 0.6 * (PROMPT + 6 * 30)
    started.clear()
    engine, jobs = make_engine(needed + 15), [ask(growing(70), 1), ask(beams(6, 20, 10, started))]
    run(engine, jobs)
    assert [job.error for job in jobs] == [None, None]
    assert jobs[1].result == expected.result and len(started) == 1
    assert jobs[1].usage.prompt_tokens == PROMPT and 0 < jobs[1].usage.recomputed_tokens <= 2 * needed
    assert engine.runner.peak_pages <= needed + 15
    assert_nothing_held(engine)


@pytest.mark.parametrize("tokens_per_pass", [1, 12, 8192])
def test_every_key_is_the_one_that_was(make_engine, ask, monkeypatch, tokens_per_pass):
    """Keys and values of a tree that is given up and computed again, by token."""
    monkeypatch.setattr(runner, "TOKENS_PER_PASS", tokens_per_pass)
    engine = make_engine(page_size=4)

    def content(branch):
        pages = engine.pool.page_table([branch.seq])[0].long()
        return engine.view.kv_cache[:, :, pages].flatten(2, 3)[:, :, : engine.pool.length(branch.seq)].clone()

    def program(root):
        (first,) = yield [Expand(root.id, (1, 2, 3), WILD, 7, NO_TAG)]
        second, (given,) = yield [Expand(first[1].id, (4, 5), WILD, 9, NO_TAG), Extend(first[2].id, (8, 9))]
        (third,) = yield [Expand(second[0].id, (6,), WILD, 1, NO_TAG)]
        branches = [*first, *second, given, *third]
        before = [content(branch) for branch in branches]
        engine.runner.page_out(branches)
        engine.view.kv_cache[:, :, [page for page in range(9, 2000)]] = torch.nan
        counts = [engine.runner.restore([third[0]]), engine.runner.restore(branches)]
        one, two, three = (branch.tokens for branch in first)  # the second of them is computed before the others
        again = max(shared(three, one), shared(three, two)) + shared(one, two) + shared(*(b.tokens for b in second))
        assert sum(counts) == 2 * 7 + 6 + 9 + 8 + 2 - again and all(branch.seq >= 0 for branch in branches)
        for branch, kv in zip(branches, before):
            torch.testing.assert_close(content(branch), kv, atol=1e-4, rtol=1e-4)
        (last,) = yield [Expand(third[0].id, (7,), WILD, 5, NO_TAG)]
        assert last[0].finish in (Finish.LENGTH, Finish.EOS)

    job = ask(program)
    run(engine, [job])
    assert job.error is None
    assert_nothing_held(engine)
