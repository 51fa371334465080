"""The KV canary: each fault of the page bookkeeping fires, names the branch, and goes unnoticed without it."""

import copy
import pickle
from functools import partial

import pytest
import torch
from helpers.jobs import Job, run
from helpers.random_mllama import TINY_SHAPE, build_random_mllama, random_inputs
from helpers.recording import Noting

from llava_cot.core import Expand, Extend, SamplingParams
from llava_cot.engine import runner
from llava_cot.engine.batch import Batch
from llava_cot.engine.branch import Branch
from llava_cot.engine.canary import Canary, CanaryError, Read
from llava_cot.engine.config import EngineConfig
from llava_cot.engine.engine import Engine
from llava_cot.prompt import split_rows
from llava_cot_kernels.page_pool import PagePool
from llava_cot_kernels.paged_kv import copy_pages
from llava_cot_kernels.stage_tags import StageTags

WILD = SamplingParams(temperature=1.2)
TAGS = StageTags([b"a", b"</x>"], ["</x>"])
NO_TAG: frozenset[int] = frozenset()
PROMPT, PAGE = 11, 4


@pytest.fixture(params=["pass", "replay", "window", "cuda"])
def how(request):
    """How the passes run: as they are, replayed, or several between two looks of the host; on a GPU in both ways."""
    return request.param


@pytest.fixture
def open_engine(random_model, how, monkeypatch):
    def make(canary):
        model = build_random_mllama(**TINY_SHAPE, seed=0).to(how) if how == "cuda" else random_model
        if how in ("replay", "window"):
            monkeypatch.setattr(runner, "open_recorder", Noting)
        steps_per_look = {"pass": 1, "replay": 1}.get(how, 4)
        config = EngineConfig(
            page_size=PAGE, num_pages=200, steps_per_look=steps_per_look, canary=canary, compile=False
        )
        engine = Engine(model, TAGS, config=config)
        engine.view.kv_cache.fill_(1.0)  # as if all pages had been used: what was never written may be NaN, and show
        engine.runner.replays |= how == "replay"
        return engine

    return make


def job_of(model, program, seed=0):
    return Job(split_rows(random_inputs(model, length=PROMPT, ratio_id=6, seed=seed), model.config)[0], program)


def growing(root):
    """Three candidates, and three from the first of them; the program stops in between."""
    (first,) = yield [Expand(root.id, (1, 2, 3), WILD, 6, NO_TAG)]
    (second,) = yield [Expand(first[0].id, (4, 5, 6), WILD, 9, NO_TAG)]
    return [branch.logprobs for branch in second]


def assert_nothing_held(engine):
    assert (engine.pages_in_use, engine.pool.num_sequences, engine.images_in_use) == (0, 0, 0)


class Fault:
    """Once it is armed, ``spoil(fault, seqs, found)`` changes or replaces what a method of the pool finds.

    It notes whom it hits: ``victims`` are ids of branches of ``job``.
    """

    def __init__(self, engine, method, spoil):
        self.is_armed, self.pool, self.victims = False, engine.pool, set()
        find = getattr(engine.pool, method)

        def spoilt(seqs, *args, **kwargs):
            found = find(seqs, *args, **kwargs)
            changed = spoil(self, seqs, found) if self.is_armed else None
            return found if changed is None else changed

        setattr(engine.pool, method, spoilt)

    def hit(self, *seqs):
        self.victims |= {branch.id for branch in self.job.branches if branch.seq in seqs}

    def holders(self, page):
        """The sequences that have a page."""
        pages = {
            seq: self.pool.page_table([seq])[0, : -(-self.pool.length(seq) // PAGE)] for seq in self.pool.sequences()
        }
        return [seq for seq, own in pages.items() if page in own]

    def run(self, engine, *, is_alone=True):
        """Arm it behind the first stage."""

        def program(root):
            steps = growing(root)
            reply = yield next(steps)
            self.is_armed = True
            return (yield from _rest(steps, reply))

        self.job = job_of(engine._model, program)
        run(engine, [self.job])
        self.is_armed = False
        if is_alone:
            assert_nothing_held(engine)
        return self.job


def _rest(steps, reply):
    try:
        while True:
            reply = yield steps.send(reply)
    except StopIteration as stop:
        return stop.value


def swap_two_sequences(fault, seqs, table):
    """The last pages of two."""
    if len(seqs) > 1:
        rows, columns = torch.arange(2), torch.tensor([(fault.pool.length(seq) - 1) // PAGE for seq in seqs[:2]])
        table[rows, columns] = table[rows, columns].flip(0)
        fault.hit(*seqs[:2])


def swap_two_pages(fault, seqs, table):
    """The first two pages of one, which has them of the prompt."""
    table[-1, :2] = table[-1, :2].flip(0)
    fault.hit(seqs[-1])


def one_slot_further(fault, seqs, appended):
    slots, _ = appended
    slots[0] += 1 if slots[0] % PAGE < PAGE - 1 else -1
    fault.hit(seqs[0])


def no_slot(fault, seqs, appended):
    slots, _ = appended
    slots[0] = -1
    fault.hit(seqs[0])


def slot_of_another(fault, seqs, appended):
    """Which of the two is stored is left open, but not both."""
    slots, _ = appended
    if len(seqs) > 1:
        slots[0] = slots[-1]
        fault.hit(seqs[0], seqs[-1])


def copy_left_out(fault, seqs, appended):
    _, copies = appended
    if len(copies):
        fault.hit(*fault.holders(copies[0, 1]))
        copies[0] = copies[0, 0]


FAULTS = [
    ("page_table", swap_two_sequences),
    ("page_table", swap_two_pages),
    ("append", one_slot_further),
    ("append", no_slot),
    ("append", slot_of_another),
    ("append", copy_left_out),
]


@pytest.mark.parametrize("method, spoil", FAULTS, ids=[spoil.__name__ for _, spoil in FAULTS])
def test_a_fault_is_found_in_the_pass_that_reads_it(open_engine, method, spoil):
    engine, unwatched = open_engine(canary=True), open_engine(canary=False)
    run(engine, [healthy := job_of(engine._model, growing)])
    assert healthy.error is None

    unnoticed = Fault(unwatched, method, spoil).run(unwatched)
    assert unnoticed.error is None and unnoticed.result != healthy.result

    fault = Fault(engine, method, spoil)
    error = fault.run(engine).error
    assert isinstance(error, CanaryError) and error.branch in fault.victims
    assert f"token {error.token} of branch {error.branch} of prompt 1, the word {error.expected:#x}" in str(error)
    assert error.found != error.expected and 0 <= error.offset < PAGE

    run(engine, [again := job_of(engine._model, growing)])
    assert again.error is None and again.result == healthy.result
    assert_nothing_held(engine)


@pytest.mark.parametrize("canary", [False, True])
def test_a_stale_page(open_engine, canary):
    """A branch was evicted, and others took its pages. Restored into new ones, it is read from the old ones."""
    engine = open_engine(canary)

    def stale(fault, seqs, table):
        for row in (row for row, seq in enumerate(seqs) if seq == fault.evicted.seq):
            table[row, : len(fault.pages)] = fault.pages
            fault.hit(fault.evicted.seq)

    fault = Fault(engine, "page_table", stale)

    def program(root):
        (first,) = yield [Expand(root.id, (1, 2, 3), WILD, 6, NO_TAG)]
        fault.evicted, fault.pages = first[0], engine.pool.page_table([first[0].seq])[0]
        engine.runner.page_out([first[0]])
        (second,) = yield [Expand(first[1].id, (4, 5, 6, 7, 8, 9), WILD, 9, NO_TAG)]
        taken = engine.pool.page_table([branch.seq for branch in second])
        assert torch.isin(fault.pages[PROMPT // PAGE :], taken).any()
        fault.is_armed = True
        (third,) = yield [Expand(first[0].id, (7, 8), WILD, 9, NO_TAG)]
        return third

    fault.job = job_of(engine._model, program)
    run(engine, [fault.job])
    error = fault.job.error
    assert (isinstance(error, CanaryError) and {error.branch} == fault.victims == {1}) if canary else error is None
    assert_nothing_held(engine)


def copy_onto(fault, seqs, appended):
    """Copy the prompt's first page to one that others wait with, once."""
    slots, copies = appended
    source = fault.pool.page_table(seqs[:1])[0, 0]
    fault.is_armed = False
    return slots, torch.cat([copies, torch.stack([source, fault.target]).unsqueeze(0)])


@pytest.mark.parametrize("canary", [False, True])
def test_a_page_that_is_overwritten_while_its_branch_waits(open_engine, canary):
    """In a session that asks for nothing: it ends, and the search that takes part in the passes goes on."""
    engine = open_engine(canary)
    run(engine, [healthy := job_of(engine._model, growing)])
    fault, replies = Fault(engine, "append", copy_onto), []
    inputs = split_rows(random_inputs(engine._model, length=PROMPT, ratio_id=6, seed=1), engine._model.config)[0]
    session = engine.open(inputs)
    request = Expand(session.root, tuple(range(20)), WILD, 6, NO_TAG)
    session.ask([request], replies.append)
    engine.run_until(lambda: replies)
    victim = session._job.branches[-1]
    fault.target = engine.pool.page_table([victim.seq])[0, 3]
    job = fault.run(engine, is_alone=False)
    assert job.error is None and job.result == healthy.result
    for _ in range(4):  # 21 branches, 32 at a time in every fourth step
        engine.step()
    if canary:
        with pytest.raises(ValueError, match="has been closed") as closed:
            session.ask([request], replies.append)
        error = closed.value.__cause__
        assert isinstance(error, CanaryError) and error.branch == victim.id and error.page == fault.target
    else:
        session.ask([request], replies.append)
        session.close()
    assert_nothing_held(engine)


@pytest.mark.parametrize("canary", [False, True])
def test_a_page_that_is_overwritten_while_others_of_its_search_grow(open_engine, canary):
    engine = open_engine(canary)
    fault = Fault(engine, "append", copy_onto)

    def program(root):
        (first,) = yield [Expand(root.id, (1, 2, 3), WILD, 6, NO_TAG)]
        fault.target, fault.is_armed = engine.pool.page_table([first[2].seq])[0, 3], True
        yield [Expand(first[0].id, (4, 5, 6), WILD, 40, NO_TAG)]

    run(engine, [job := job_of(engine._model, program)])
    error = job.error
    assert (isinstance(error, CanaryError) and error.branch == 3 and error.token == 12) if canary else error is None
    assert_nothing_held(engine)


def test_tokens_that_are_taken_back(open_engine):
    """A pass over several tokens of which some turn out wrong, and a branch that goes on with a sibling's pages."""
    engine = open_engine(canary=True)

    def program(root, is_tried):
        (first,) = yield [Expand(root.id, (1, 2), WILD, 6, NO_TAG)]
        if is_tried:
            for branch in first:
                for wrong in ([3, 4, 5], [6], [7, 8, 9, 10, 11]):
                    engine.runner.decode({branch: [branch.tokens[-1], *wrong]})
                    engine.pool.truncate(branch.seq, branch.length - 1)
            twin = Branch(root, -1, root.length, image=root.image, tokens=list(first[0].tokens))
            twin.length += len(twin.tokens)
            (twin.seq,) = engine.pool.fork(first[0].seq, 1)
            engine.runner.decode({twin: [twin.tokens[-1], 3]})
            engine.pool.free(twin.seq)
        second = yield [Expand(branch.id, (3, 4), WILD, 9, NO_TAG) for branch in first]
        last = yield [Extend(kids[0].id, (5, 6, 7)) for kids in second]
        return [branch.logprobs for kids in (*second, *last) for branch in kids]

    jobs = [job_of(engine._model, partial(program, is_tried=is_tried)) for is_tried in (False, True)]
    for job in jobs:
        run(engine, [job])
        assert job.error is None
    for one, other in zip(*(job.result for job in jobs), strict=True):
        assert one == pytest.approx(other, abs=1e-4)
    assert_nothing_held(engine)


@pytest.mark.parametrize("is_split", [False, True])
def test_a_pass_over_several_tokens_of_a_branch(is_split):
    """As one row, or as a row for each of its tokens: all are written before one is read."""
    canary, pool = Canary(20, PAGE, torch.device("cpu")), PagePool(20, PAGE)
    root = Branch(None, pool.create(), 6)
    slots, _ = pool.append([root.seq], [6])
    canary.write(canary.prompt(root, torch.arange(6)), slots)
    branches = [Branch(root, seq, 6) for seq in pool.fork(root.seq, 2)]
    new = [[7, 8, 9], [7, 5, 4, 3, 2]]
    slots, copies = pool.append([branch.seq for branch in branches], [3, 5])
    copy_pages(canary.cache, copies)
    rows = [Read(branch, 6, tokens) for branch, tokens in zip(branches, new)]
    cu_seqlens = torch.tensor([0, 3, 8])
    if is_split:
        rows = [Read(b, n, t[: at + 1], at) for b, n, t, _ in rows for at in range(len(t))]
        cu_seqlens = None
    page_table = pool.page_table([row.branch.seq for row in rows])
    seq_lens = torch.tensor([row.length + len(row.new) for row in rows], dtype=torch.int32)

    def compute():
        batch = Batch(slots, page_table, seq_lens, cu_seqlens, trail=canary.trail(rows))
        canary.follow(torch.tensor([token for tokens in new for token in tokens]), batch)
        canary.look(rows, page_table, batch.trail)

    compute()
    canary.write(torch.zeros(1, 2, dtype=torch.int64), slots[7:])
    slots[7] = -1
    with pytest.raises(CanaryError) as found:
        compute()
    assert (found.value.token, found.value.found) == (10, 0)


def test_a_canary_that_is_off_costs_nothing(open_engine, monkeypatch):
    for name in ("__init__", "follow", "write", "look", "find"):
        monkeypatch.delattr(Canary, name)
    engine = open_engine(canary=False)
    run(engine, [job := job_of(engine._model, growing)])
    assert job.error is None and engine.view.canary is None


@pytest.mark.parametrize("copied", [copy.copy, lambda error: pickle.loads(pickle.dumps(error))], ids=["copy", "pickle"])
def test_an_error_can_be_copied(copied):
    error = CanaryError(3, 1, 17, 4, 1, 0xAB, 0)
    assert str(copied(error)) == str(error) and vars(copied(error)) == vars(error)
    assert "page 4 must have at offset 1 what was computed for token 17 of branch 3 of prompt 1" in str(error)
    assert "the word 0xab, but has 0x0" in str(error)
