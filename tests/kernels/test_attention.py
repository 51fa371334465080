"""Paged and shared attention against PyTorch's own, in float64 and in the dtype at hand.

Tolerance: at most twice the error that PyTorch's attention makes in the same dtype, plus an eps-sized floor.
"""

import pytest
import torch
from helpers.attention import Problem, assert_close, check, dense, device_of, int32, random_images, run_shared

from llava_cot_kernels.attention import paged_attention, shared_attention
from llava_cot_kernels.checks import FLOATS

BACKENDS = ["native", "reference", "triton"]


@pytest.mark.covering(1, backend="triton")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("heads", "head_dim", "page_size"),
    [((4, 2), 32, 16), ((3, 3), 7, 5), ((8, 1), 64, 1), ((1, 1), 1, 4), ((34, 2), 24, 128), ((4, 1), 128, 16)],
)
def test_decode(backend, dtype, heads, head_dim, page_size):
    torch.manual_seed(head_dim)
    lens = [1, 2, page_size - 1, page_size, page_size + 1, 63, 64, 65, 131, 0]
    check(Problem.random(lens, [1] * 10, heads=heads, head_dim=head_dim, page_size=page_size, dtype=dtype), backend)


@pytest.mark.covering(1, backend="triton")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("lens", "counts"),
    [
        ([37], [37]),  # a whole prompt
        ([130, 65, 7], [64, 1, 7]),  # chunks behind a cached start, one decoding between them
        ([3, 0, 5, 1], [5, 0, 2, 2]),  # more queries than keys: the first see nothing
        ([20, 33], [0, 0]),
    ],
)
def test_chunks(backend, dtype, lens, counts):
    torch.manual_seed(sum(lens))
    check(Problem.random(lens, counts, heads=(6, 2), head_dim=40, page_size=8, dtype=dtype), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_shared_prefix(backend, dtype):
    torch.manual_seed(5)
    lens = [200, 161, 160, 177, 90, 201, 0, 199]
    counts = [1, 1, 3, 1, 2, 1, 1, 20]
    problem = Problem.random(lens, counts, prefix=160, heads=(8, 2), head_dim=16, dtype=dtype)
    check(problem, backend, prefix_group=int32(0, 0, 0, -1, 0, 0, 0, 0), prefix_lens=int32(160))


WINDOWS = [1, 7, 16, 61, 64, 65, 130, 10_000]  # 16 is a page; the others are around blocks of keys


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", WINDOWS)
def test_window(backend, window):
    """Keys before the windows are NaN: they are not read."""
    torch.manual_seed(window)
    lens, counts = [1, 15, 16, 17, 64, 131, 300, 3, 0, 600], [1, 1, 2, 1, 64, 1, 9, 5, 1, 1]
    problem = Problem.random(lens, counts, heads=(6, 2), head_dim=24).without_keys_before(window)
    check(problem, backend, window=window)


@pytest.mark.covering(1, backend="triton")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("window", "page_size"), [(1, 1), (13, 5), (37, 16), (128, 128)])
def test_window_of_every_dtype(backend, dtype, window, page_size):
    torch.manual_seed(window)
    lens, counts = [300, 261, 90], [1, 40, 1]
    problem = Problem.random(lens, counts, heads=(6, 2), head_dim=24, page_size=page_size, dtype=dtype)
    check(problem.without_keys_before(window), backend, window=window)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [1, 29, 64, 150])
def test_window_over_a_shared_prefix(backend, window):
    """The windows of some sequences end in the shared pages, those of others reach into them, or begin behind them."""
    torch.manual_seed(window)
    lens, counts = [200, 161, 160, 177, 90, 201, 0, 199, 400], [1, 1, 3, 1, 2, 1, 1, 20, 1]
    problem = Problem.random(lens, counts, prefix=160, heads=(8, 2), head_dim=16).without_keys_before(window)
    hints = {"prefix_group": int32(0, 0, 0, -1, 0, 0, 0, 0, 0), "prefix_lens": int32(160)}
    check(problem, backend, window=window, **hints)


def test_a_window_that_hides_nothing_changes_no_bit():
    torch.manual_seed(13)
    problem = Problem.random([140, 129, 64], [1, 9, 64])
    assert all(map(torch.equal, problem.run(window=140), problem.run()))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("window", [1, 20, 100, 190])
def test_hints_chunks_and_threads_change_no_bit_of_a_window(dtype, window):
    torch.manual_seed(14)
    lens, counts = [140, 129, 128, 300, 180, 200], [1, 1, 5, 1, 9, 72]
    problem = Problem.random(lens, counts, prefix=128, heads=(8, 2), dtype=dtype)
    expected = problem.run(window=window)
    groups = int32(0, 0, 0, 0, 1, 1)
    num_threads = torch.get_num_threads()
    try:
        for threads in (1, 5):
            torch.set_num_threads(threads)
            for prefix_len in (1, 100, 128, 10_000):
                got = problem.run(window=window, prefix_group=groups, prefix_lens=int32(prefix_len, prefix_len))
                assert all(map(torch.equal, got, expected))
    finally:
        torch.set_num_threads(num_threads)
    last, problem.query, problem.cu_seqlens_q = problem.query, problem.query[-1:], int32(0, 1)
    problem.page_table, problem.seq_lens = problem.page_table[-1:], problem.seq_lens[-1:]
    assert last.shape[0] == 89 and torch.equal(problem.run(window=window)[0][0], expected[0][-1])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("prefix_len", [0, 1, 63, 64, 100, 128, 160, 10_000, -300])
def test_the_prefix_hint_changes_no_bit(dtype, prefix_len):
    """Nor does a wrong one: all share 128 tokens, whatever it says, but for 3 and 4, which have theirs elsewhere."""
    torch.manual_seed(6)
    problem = Problem.random([140, 129, 128, 300, 180, 170], [1, 1, 5, 1, 9, 1], prefix=128, dtype=dtype)
    problem.page_table[3:5] = problem.page_table[3].flip(0)
    torch.nan_to_num_(problem.key_cache)
    torch.nan_to_num_(problem.value_cache)
    expected = problem.run()
    for groups in (int32(0, 0, 0, 0, 0, 0), int32(0, 1, 0, 1, 1, 0), int32(1, -1, 1, -1, 0, 1)):
        got = problem.run(prefix_group=groups, prefix_lens=int32(prefix_len, prefix_len))
        assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


def test_chunks_and_threads_change_no_bit():
    torch.manual_seed(7)
    whole = Problem.random([150, 150], [150, 150], prefix=144, heads=(8, 2), head_dim=128)
    expected, _ = whole.run()
    num_threads = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            got, _ = whole.run()
            assert torch.equal(got, expected)
    finally:
        torch.set_num_threads(num_threads)
    for position in (0, 1, 63, 64, 65, 149):
        whole_query = whole.query
        whole.query, whole.seq_lens = whole_query[[position, 150 + position]], int32(position + 1, position + 1)
        whole.cu_seqlens_q = int32(0, 1, 2)
        assert torch.equal(whole.run()[0], expected[[position, 150 + position]])
        whole.query = whole_query


def test_a_sequence_with_nan_spoils_no_other():
    torch.manual_seed(8)
    problem = Problem.random([90, 95, 91], [1, 1, 1], prefix=64)
    hints = {"prefix_group": int32(0, 0, 0), "prefix_lens": int32(64)}
    expected, _ = problem.run(**hints)
    own_page = problem.page_table[1, 4]
    problem.value_cache[own_page, 3] = torch.nan
    got, _ = problem.run(**hints)
    assert got[1].isnan().all()
    assert torch.equal(got[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_scores(backend):
    torch.manual_seed(9)
    problem = Problem.random([100, 70], [3, 3])
    problem.softmax_scale = 40.0
    for _ in range(2):
        score_size = problem.dense(torch.float64)[1].abs().max().item()
        assert score_size > 500
        check(problem, backend, score_size)
        problem.key_cache *= -1


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_query_per_sequence_is_the_default(backend):
    torch.manual_seed(10)
    problem = Problem.random([5, 40, 17], [1, 1, 1])
    tensors = (problem.query, problem.key_cache, problem.value_cache, problem.page_table, problem.seq_lens)
    *others, page_table, seq_lens = (tensor.to(device_of(backend)) for tensor in tensors)
    wide = torch.cat([page_table, page_table], 1)[:, : page_table.shape[1]]  # a strided table
    out = paged_attention(*others, wide, seq_lens, softmax_scale=problem.softmax_scale, backend=backend).cpu()
    assert torch.equal(out, problem.run(backend)[0])


@pytest.mark.covering(1, backend="triton")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("lens", "groups", "heads", "head_dim"),
    [
        ([64], [0] * 16, (4, 2), 32),
        ([161, 1, 0, 63, 65], [3, 0, -1, 0, 2, 4, 0, 3, 1, -1], (6, 2), 7),
        ([37, 11, 97], [2] * 33 + [0], (3, 3), 20),
        ([9], [], (2, 1), 8),
        ([], [-1, -1], (2, 1), 8),
        ([300], [0], (8, 2), 128),
    ],
)
def test_shared_attention(backend, dtype, lens, groups, heads, head_dim):
    torch.manual_seed(len(groups))
    query, key, value, group, starts = random_images(lens, groups, heads=heads, head_dim=head_dim, dtype=dtype)
    scale = head_dim**-0.5
    results = {}
    for precision in {dtype, torch.float32, torch.float64}:
        out = torch.zeros(query.shape, dtype=precision)
        lse = torch.full(query.shape[:2], -torch.inf, dtype=precision)
        for row, image in enumerate(groups):
            if image >= 0 and lens[image]:
                keys = slice(starts[image], starts[image + 1])
                out[row], lse[row] = dense(*(x.to(precision) for x in (query[row], key[keys], value[keys])), scale)
        results[precision] = out, lse
    for offsets in (starts, starts.int()):
        out, lse = run_shared(query, key, value, group, offsets, softmax_scale=scale, backend=backend)
        assert out.dtype == dtype and lse.dtype == torch.float32
        assert_close(out, results[dtype][0], results[torch.float64][0])
        assert_close(lse, results[torch.float32][1], results[torch.float64][1])


def test_shared_attention_with_two_threads_changes_no_bit():
    torch.manual_seed(11)
    query, key, value, group, starts = random_images([500, 300], [0, 1, 1, 0, -1] * 9, heads=(8, 2), head_dim=64)
    num_threads = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(shared_attention(query, key, value, group, starts, softmax_scale=0.125, backend="native"))
    finally:
        torch.set_num_threads(num_threads)
    assert torch.equal(*results)


def paged_op_arguments(problem, prefix_group, prefix_lens, window=0):
    out, lse = torch.full(problem.query.shape, torch.nan), torch.full(problem.query.shape[:2], torch.nan)
    return (
        problem.query, problem.key_cache, problem.value_cache, problem.page_table, problem.seq_lens,
        problem.cu_seqlens_q, prefix_group, prefix_lens, problem.softmax_scale, window, out, lse,
    )  # fmt: skip


def test_ops_fill_poisoned_outputs_and_pass_opcheck():
    torch.manual_seed(12)
    ops = torch.ops.llava_cot_kernels
    problem = Problem.random([80, 70, 0, 3], [1, 4, 1, 5], prefix=64)
    for *hints, window in ((None, None, 0), (int32(0, 0, -1, -1), int32(64), 0), (None, None, 30)):
        arguments = paged_op_arguments(problem, *hints, window)
        ops.paged_attention(*arguments)
        expected, expected_lse = problem.run("native", window)
        assert torch.equal(arguments[-2], expected) and torch.equal(arguments[-1], expected_lse)
        assert not arguments[-2].isnan().any() and not arguments[-1].isnan().any()
        torch.nan_to_num_(problem.key_cache)  # opcheck compares its inputs, and NaN differs from NaN
        torch.nan_to_num_(problem.value_cache)
        torch.library.opcheck(ops.paged_attention.default, arguments)

    query, key, value, group, starts = random_images([70, 9], [1, 0, -1, 0])
    out, lse = torch.full(query.shape, torch.nan), torch.full(query.shape[:2], torch.nan)
    arguments = (query, key, value, group, starts, 0.2, out, lse)
    ops.shared_attention(*arguments)
    assert torch.equal(out, shared_attention(query, key, value, group, starts, softmax_scale=0.2, backend="native"))
    assert not out.isnan().any() and not lse.isnan().any()
    torch.library.opcheck(ops.shared_attention.default, arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": torch.zeros(3, 3, 8)}, ValueError, "query must have a multiple of Hkv=2 heads .*, got 3"),
        ({"query": torch.zeros(2, 4, 8)}, ValueError, "query must have one row per sequence, B=3, .*got 2"),
        ({"query": torch.zeros(3, 8, 4).mT}, ValueError, "query must have stride 1 in its last dimension"),
        ({"query": torch.zeros(3, 4, 8).double()}, TypeError, "query must be float32 or bfloat16 or .*, got float64"),
        ({"value_cache": torch.zeros(6, 4, 2, 7)}, ValueError, "value_cache must have D=8 in dimension 3, got 7"),
        ({"seq_lens": int32(1, 2)}, ValueError, "seq_lens must have B=3 in dimension 0, got 2"),
        ({"seq_lens": int32(1, 2, 9)}, ValueError, r"seq_lens must be in \[0, 8\], got 9"),
        ({"page_table": torch.full((3, 2), 6).int()}, ValueError, r"page_table must be in \[0, 5\], got 6"),
        ({"cu_seqlens_q": int32(0, 1, 3)}, ValueError, "cu_seqlens_q must have 4 in dimension 0, got 3"),
        ({"cu_seqlens_q": int32(0, 1, 2, 2)}, ValueError, "cu_seqlens_q must start at 0 and end at 3, got 0 and 2"),
        ({"cu_seqlens_q": int32(0, 2, 1, 3)}, ValueError, r"cu_seqlens_q must not decrease, got \[0, 2, 1, 3\]"),
        ({"prefix_group": int32(0, 0, 0)}, ValueError, "prefix_group and prefix_lens must be given together"),
        ({"prefix_group": int32(0, 0, 1), "prefix_lens": int32(4)}, ValueError, "prefix_group must be in .*, got 1"),
        ({"window": -1}, ValueError, "window must be >= 0, got -1"),
        ({"window": 4.0}, TypeError, "window must be an int, got float"),
        ({"backend": "cutlass"}, ValueError, "backend of paged_attention on cpu must be one of"),
    ],
)  # fmt: skip
def test_paged_attention_errors(change, error, message):
    arguments = {
        "query": torch.zeros(3, 4, 8),
        "key_cache": torch.zeros(6, 4, 2, 8),
        "value_cache": torch.zeros(6, 4, 2, 8),
        "page_table": torch.zeros(3, 2, dtype=torch.int32),
        "seq_lens": int32(1, 2, 8),
        "softmax_scale": 1.0,
    }
    with pytest.raises(error, match=message):
        paged_attention(**{**arguments, **change})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"group": int32(0, 1, 2)}, ValueError, r"group must be in \[-1, 1\], got 2"),
        ({"group": int32(0, 1)}, ValueError, "group must have N=3 in dimension 0, got 2"),
        ({"cu_seqlens_k": torch.tensor([0, 6, 5])}, ValueError, "cu_seqlens_k must not decrease"),
        ({"cu_seqlens_k": torch.tensor([0, 6, 9])}, ValueError, r"cu_seqlens_k must be in \[0, 8\], got 9"),
        ({"cu_seqlens_k": torch.tensor([], dtype=torch.int64)}, ValueError, r"cu_seqlens_k must have G \+ 1 >= 1"),
        ({"cu_seqlens_k": torch.tensor([0.0, 8.0])}, TypeError, "cu_seqlens_k must be int32 or int64, got float32"),
        ({"value": torch.zeros(7, 2, 4)}, ValueError, "value must have S=8 in dimension 0, got 7"),
        ({"key": torch.zeros(8, 4, 2).mT}, ValueError, "key must have stride 1 in its last dimension"),
    ],
)  # fmt: skip
def test_shared_attention_errors(change, error, message):
    arguments = {
        "query": torch.zeros(3, 4, 4),
        "key": torch.zeros(8, 2, 4),
        "value": torch.zeros(8, 2, 4),
        "group": int32(0, -1, 1),
        "cu_seqlens_k": torch.tensor([0, 3, 8]),
        "softmax_scale": 1.0,
    }
    with pytest.raises(error, match=message):
        shared_attention(**{**arguments, **change})


def test_the_ops_themselves_refuse_what_would_leave_memory():
    problem = Problem.random([20], [1])
    ops = torch.ops.llava_cot_kernels
    arguments = paged_op_arguments(problem, None, None)
    for index, value, message in [
        (3, torch.full_like(problem.page_table, 99), "page_table must be in"),
        (4, int32(33), "seq_lens must fit page_table"),
        (5, int32(0, 2), "cu_seqlens_q must go from 0 to 1"),
        (6, int32(0), "prefix_group needs prefix_lens"),
        (9, -1, "window must be >= 0, got -1"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            ops.paged_attention(*arguments[:index], value, *arguments[index + 1 :])
    query, key, value, group, starts = random_images([4], [0])
    out, lse = torch.empty(query.shape), torch.empty(query.shape[:2])
    with pytest.raises(RuntimeError, match="group must be in"):
        ops.shared_attention(query, key, value, group + 1, starts, 1.0, out, lse)
    with pytest.raises(RuntimeError, match="cu_seqlens_k must not decrease and be in"):
        ops.shared_attention(query, key, value, group, starts + 3, 1.0, out, lse)
