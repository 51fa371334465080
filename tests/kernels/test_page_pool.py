"""The page pool against its plain-Python twin, against a model of the cache's content, and at its limits."""

import random

import pytest
import torch

from llava_cot_kernels.page_pool import OutOfPages, PagePool
from llava_cot_kernels.reference import page_pool as reference

POOLS = [PagePool, reference.PagePool]


def random_append(rng, live, page_size):
    """Some of the live sequences in random order; counts are often 1, as in decoding, or around a page."""
    seqs = rng.sample(live, rng.randint(1, min(len(live), 8)))
    choices = [0, 1, 1, 1, 1, page_size - 1, page_size, page_size + 1, rng.randint(0, 3 * page_size)]
    return seqs, [rng.choice(choices) for _ in seqs]


def assert_invariant(pool):
    used = sum(pool.ref_count(page) > 0 for page in range(pool.num_pages))
    assert pool.num_free + used == pool.num_pages


def assert_same(pool, twin, live):
    assert pool.num_free == twin.num_free
    assert pool.num_sequences == twin.num_sequences == len(live)
    assert [pool.ref_count(p) for p in range(pool.num_pages)] == [twin.ref_count(p) for p in range(twin.num_pages)]
    assert [pool.length(seq) for seq in live] == [twin.length(seq) for seq in live]
    assert torch.equal(pool.page_table(live), twin.page_table(live))
    assert_invariant(pool)


@pytest.mark.parametrize(("seed", "num_pages", "page_size"), [(0, 40, 4), (1, 13, 1), (2, 29, 16)])
def test_equals_the_reference_over_3000_steps(seed, num_pages, page_size):
    rng = random.Random(seed)
    pool, twin = PagePool(num_pages, page_size), reference.PagePool(num_pages, page_size)
    live, refused = [], 0
    for _ in range(3_000):
        action = rng.choices(["create", "fork", "append", "truncate", "free"], [1, 2, 8, 2, 2])[0]
        if not live or (action == "create" and len(live) < 12):
            live.append(pool.create())
            assert live[-1] == twin.create()
        elif action == "fork" and len(live) < 12:
            parent, n = rng.choice(live), rng.randint(0, 4)
            kids = pool.fork(parent, n)
            assert kids == twin.fork(parent, n)
            live += kids
        elif action == "append":
            seqs, counts = random_append(rng, live, page_size)
            try:
                slots, copies = twin.append(seqs, counts)
            except OutOfPages as expected:
                refused += 1
                with pytest.raises(OutOfPages, match=f"^{expected}$"):
                    pool.append(seqs, counts)
            else:
                got_slots, got_copies = pool.append(seqs, counts)
                assert got_slots.dtype == torch.int64 and got_copies.dtype == torch.int32
                assert torch.equal(got_slots, slots) and torch.equal(got_copies, copies)
        elif action == "truncate":
            seq = rng.choice(live)
            length = rng.randint(0, pool.length(seq))
            pool.truncate(seq, length)
            twin.truncate(seq, length)
        elif action == "free":
            seq = live.pop(rng.randrange(len(live)))
            pool.free(seq)
            twin.free(seq)
        assert_same(pool, twin, live)
    assert 0 < refused < 1_500  # the pool was full often enough to matter, and not always


@pytest.mark.parametrize(("seed", "num_pages", "page_size"), [(3, 40, 4), (4, 60, 1), (5, 23, 7)])
def test_every_live_sequence_reads_back_its_content_over_3000_steps(seed, num_pages, page_size):
    rng = random.Random(seed)
    pool = PagePool(num_pages, page_size)
    cache = torch.full((num_pages, page_size), -1, dtype=torch.int64)
    content: dict[int, list[int]] = {}
    next_token = 0
    for _ in range(3_000):
        action = rng.choices(["create", "fork", "append", "truncate", "free"], [1, 2, 8, 2, 1])[0]
        seq = rng.choice(list(content)) if content else -1
        if not content or (action == "create" and len(content) < 16):
            content[pool.create()] = []
        elif action == "fork" and len(content) < 16:
            content |= {kid: content[seq].copy() for kid in pool.fork(seq, rng.randint(1, 3))}
        elif action == "append":
            seqs, counts = random_append(rng, list(content), page_size)
            try:
                slots, copies = pool.append(seqs, counts)
            except OutOfPages:
                pool.free(seq)
                del content[seq]
            else:
                sources, targets = copies.long().unbind(1)
                assert len(set(targets.tolist())) == len(targets)
                assert not set(targets.tolist()) & set(sources.tolist())
                cache[targets] = cache[sources]
                cache.view(-1)[slots] = torch.arange(next_token, next_token + sum(counts))
                for appended, count in zip(seqs, counts):
                    content[appended] += range(next_token, next_token + count)
                    next_token += count
        elif action == "truncate":
            del content[seq][rng.randint(max(0, len(content[seq]) - 2 * page_size), len(content[seq])) :]
            pool.truncate(seq, len(content[seq]))
        elif action == "free":
            pool.free(seq)
            del content[seq]
        table = pool.page_table(list(content))
        for row, expected in zip(table.long(), content.values()):
            assert cache[row].flatten()[: len(expected)].tolist() == expected
        assert_invariant(pool)
    for seq in content:
        pool.free(seq)
    assert pool.num_free == num_pages and pool.num_sequences == 0
    assert next_token > 3_000


@pytest.mark.parametrize("pool_type", POOLS)
class TestAppend:
    def test_k_sharers_alone_make_k_minus_1_copies_and_the_last_writes_in_place(self, pool_type):
        pool = pool_type(10, 4)
        parent = pool.create()
        pool.append([parent], [6])  # pages 0 and 1, the second half full
        kids = pool.fork(parent, 3)
        slots, copies = pool.append([parent, *kids], [1, 1, 1, 1])
        assert copies.tolist() == [[1, 2], [1, 3], [1, 4]]
        assert slots.tolist() == [2 * 4 + 2, 3 * 4 + 2, 4 * 4 + 2, 1 * 4 + 2]
        assert [pool.ref_count(page) for page in range(5)] == [4, 1, 1, 1, 1]

    def test_all_sharers_copy_while_somebody_else_holds_the_page(self, pool_type):
        pool = pool_type(10, 4)
        parent = pool.create()
        pool.append([parent], [6])
        kids = pool.fork(parent, 2)
        _, copies = pool.append(kids, [1, 1])
        assert copies.tolist() == [[1, 2], [1, 3]]
        assert pool.append([parent], [1])[1].tolist() == []

    def test_full_pages_are_never_copied(self, pool_type):
        pool = pool_type(10, 4)
        parent = pool.create()
        pool.append([parent], [8])
        kids = pool.fork(parent, 4)
        slots, copies = pool.append(kids, [1] * 4)
        assert copies.shape == (0, 2)
        assert slots.tolist() == [8, 12, 16, 20]

    def test_copies_on_the_first_write_after_a_truncation(self, pool_type):
        pool = pool_type(10, 4)
        parent = pool.create()
        pool.append([parent], [12])
        (kid,) = pool.fork(parent, 1)
        pool.truncate(kid, 6)
        assert [pool.ref_count(page) for page in range(3)] == [2, 2, 1]
        slots, copies = pool.append([kid], [3])
        assert copies.tolist() == [[1, 3]]
        assert slots.tolist() == [3 * 4 + 2, 3 * 4 + 3, 4 * 4]
        pool.truncate(parent, 0)
        assert pool.num_free == 10 - 3

    def test_raises_exactly_when_pages_are_short_and_changes_nothing(self, pool_type):
        pool = pool_type(4, 4)
        parent = pool.create()
        pool.append([parent], [6])
        kids = pool.fork(parent, 2)
        before = [pool.ref_count(page) for page in range(4)], pool.page_table([parent, *kids]).tolist()
        with pytest.raises(OutOfPages, match=r"^append needs 3 pages, 2 are free$"):
            pool.append([*kids, parent], [1, 1, 3])
        with pytest.raises(OutOfPages, match="are free"):
            pool.append([parent, *kids], [2**60, 2**60, 2**60])
        assert ([pool.ref_count(page) for page in range(4)], pool.page_table([parent, *kids]).tolist()) == before
        assert [pool.length(seq) for seq in (parent, *kids)] == [6, 6, 6]
        pool.append([*kids, parent], [1, 1, 2])  # exactly the two free pages
        assert pool.num_free == 0

    def test_count_0_is_a_no_op(self, pool_type):
        pool = pool_type(3, 4)
        parent = pool.create()
        pool.append([parent], [2])
        kids = pool.fork(parent, 2)
        slots, copies = pool.append([parent, *kids], [0, 0, 0])
        assert slots.shape == (0,) and copies.shape == (0, 2)
        slots, copies = pool.append([], [])
        assert slots.shape == (0,) and copies.shape == (0, 2)
        assert pool.ref_count(0) == 3 and pool.num_free == 2


@pytest.mark.parametrize("pool_type", POOLS)
class TestErrors:
    def test_values(self, pool_type):
        pool = pool_type(8, 4)
        a, b = pool.create(), pool.create()
        pool.append([a], [5])
        for call, message in [
            (lambda: pool.append([a, b, a], [1, 1, 1]), f"seqs must not repeat a sequence, got {a} twice"),
            (lambda: pool.append([a, b], [1, -2]), "counts must be >= 0, got -2"),
            (lambda: pool.append([a, b], [1]), "counts must have one entry per sequence, 2, got 1"),
            (lambda: pool.truncate(a, 6), r"length must be in \[0, 5\], got 6"),
            (lambda: pool.truncate(a, -1), r"length must be in \[0, 5\], got -1"),
            (lambda: pool.fork(a, -1), "n must be >= 0, got -1"),
            (lambda: pool.ref_count(8), r"page must be in \[0, 7\], got 8"),
            (lambda: pool_type(-1, 4), "num_pages must be in .*, got -1 and 4"),
            (lambda: pool_type(8, 0), r"page_size in \[1, .*, got 8 and 0"),
        ]:
            with pytest.raises(ValueError, match=message):
                call()
        assert pool.length(a) == 5 and pool.length(b) == 0 and pool.num_free == 6 and pool.num_sequences == 2

    def test_unknown_and_freed_sequences(self, pool_type):
        pool = pool_type(8, 4)
        live, freed = pool.create(), pool.create()
        pool.append([freed], [3])
        pool.free(freed)
        for seq in (freed, 99, -1):
            for call in (
                lambda seq=seq: pool.append([live, seq], [1, 1]),
                lambda seq=seq: pool.fork(seq, 1),
                lambda seq=seq: pool.truncate(seq, 0),
                lambda seq=seq: pool.free(seq),
                lambda seq=seq: pool.page_table([live, seq]),
                lambda seq=seq: pool.length(seq),
            ):
                with pytest.raises(KeyError, match=f"sequence {seq} is freed or unknown"):
                    call()
        assert pool.num_free == 8 and pool.length(live) == 0

    def test_handles_are_never_reused(self, pool_type):
        pool = pool_type(8, 4)
        seen = set()
        for _ in range(20):
            seq = pool.create()
            kids = pool.fork(seq, 3)
            assert not seen & {seq, *kids}
            seen |= {seq, *kids}
            for handle in (seq, *kids):
                pool.free(handle)


@pytest.mark.parametrize("pool_type", POOLS)
def test_fork_keeps_the_parent_and_takes_no_page(pool_type):
    pool = pool_type(4, 4)
    parent = pool.create()
    pool.append([parent], [9])
    assert pool.fork(parent, 0) == []
    kids = pool.fork(parent, 5)
    assert pool.num_free == 1
    assert pool.page_table([parent, *kids]).tolist() == [[0, 1, 2]] * 6
    pool.free(parent)
    assert [pool.length(kid) for kid in kids] == [9] * 5


@pytest.mark.parametrize("pool_type", POOLS)
def test_page_table_shapes(pool_type):
    pool = pool_type(8, 4)
    empty, short, long = pool.create(), pool.create(), pool.create()
    assert pool.page_table([]).shape == (0, 1)
    assert pool.page_table([empty]).tolist() == [[0]]
    pool.append([short, long], [1, 12])
    table = pool.page_table([long, empty, short, long])
    assert table.dtype == torch.int32
    assert table.tolist() == [[1, 2, 3], [0, 0, 0], [0, 0, 0], [1, 2, 3]]


def test_page_table_fills_out_and_nothing_else():
    pool = PagePool(8, 4)
    short, long = pool.create(), pool.create()
    pool.append([short, long], [1, 12])
    buffer = torch.full((4, 6), -7, dtype=torch.int32)
    returned = pool.page_table([long, short], out=buffer[1:3, :5])
    assert buffer.tolist() == [[-7] * 6, [1, 2, 3, 0, 0, -7], [0, 0, 0, 0, 0, -7], [-7] * 6]
    assert returned.data_ptr() == buffer[1:3].data_ptr()
    with pytest.raises(ValueError, match=r"out must be \[2, at least 3\], got torch.Size\(\[2, 2\]\)"):
        pool.page_table([long, short], out=buffer[:2, :2])
    with pytest.raises(ValueError, match=r"out must be \[2, at least 3\]"):
        pool.page_table([long, short], out=buffer)
    with pytest.raises(TypeError, match=r"out must be int32, got torch.int64"):
        pool.page_table([long, short], out=torch.zeros(2, 3, dtype=torch.int64))
    assert "num_free=4" in repr(pool)
