"""What is particular to the Triton kernels of attention: who reads which key, in how many launches, and equal bits.

That they are right is tested with the other back ends in test_attention.py. Without a GPU, Triton's interpreter runs
them, and counts the reads.
"""

from collections import Counter

import pytest
import torch
from helpers.attention import Problem, device_of, int32, random_images, run_shared

from llava_cot_kernels.attention import paged_attention, shared_attention
from llava_cot_kernels.backend import available

DEVICE = device_of("triton")
available("paged_attention", DEVICE)  # imports the module
kernels = pytest.importorskip("llava_cot_kernels.triton.attention")
TILES = [torch.float32, torch.bfloat16]  # one dtype for each height of a tile
interpreted = pytest.mark.skipif(DEVICE == "cuda", reason="only the interpreter can count")


@pytest.fixture
def small(monkeypatch):
    """Splits of few keys, and groups at any size, so that small problems go through everything."""
    monkeypatch.setattr(kernels, "SPLIT_KEYS", (32,))
    monkeypatch.setattr(kernels, "IMAGE_SPLIT_KEYS", 32)
    monkeypatch.setattr(kernels, "SHARING_PAYS", ((1, 0),))


@pytest.fixture
def loads(monkeypatch):
    """``loads(tensor)``: how often each of its elements has been read, in the shape of ``tensor``."""
    from triton.runtime.interpreter import InterpreterBuilder

    addresses = Counter()
    original = InterpreterBuilder.create_masked_load

    def counted(self, pointers, mask, *others):
        addresses.update(pointers.data[mask.data].ravel().tolist())
        return original(self, pointers, mask, *others)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", counted)

    def reads(tensor):
        flat = torch.arange(tensor.untyped_storage().nbytes() // tensor.element_size())
        offsets = flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
        base = tensor.untyped_storage().data_ptr()
        counts = [addresses[base + offset * tensor.element_size()] for offset in offsets.flatten().tolist()]
        return torch.tensor(counts).view(tensor.shape)

    return reads


@pytest.fixture
def launches(monkeypatch):
    """The names of the kernels that are launched. They do not run: what they compute is tested elsewhere."""
    from triton.runtime.interpreter import GridExecutor

    names = []
    monkeypatch.setattr(GridExecutor, "__call__", lambda self, *args, **kwargs: names.append(self.fn.__name__))
    return names


@pytest.fixture
def capture(monkeypatch):
    """``capture(run)``: run's results, and a function that launches again what run launched, as it was launched."""
    if DEVICE == "cuda":
        return captured_graph
    from triton.runtime.interpreter import GridExecutor

    original = GridExecutor.__call__

    def recorded(run):
        launched = []
        monkeypatch.setattr(GridExecutor, "__call__", lambda *args, **kwargs: launched.append((args, kwargs)))
        results = run()
        monkeypatch.setattr(GridExecutor, "__call__", original)

        def replay():
            for args, kwargs in launched:
                original(*args, **kwargs)

        return results, replay

    return recorded


def captured_graph(run):
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    return results, graph.replay


def same(got, expected):
    return all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def without_nan(problem):
    """The caches without NaN in unused slots, so that wrong hints may point at them."""
    torch.nan_to_num_(problem.key_cache)
    torch.nan_to_num_(problem.value_cache)
    return problem


@interpreted
@pytest.mark.parametrize("rows", [[0] * 16, [2, 0, -1, 2, 0, 3] * 5], ids=["one image", "four images"])
def test_each_key_of_an_image_is_read_once(loads, rows):
    torch.manual_seed(0)
    lens = [150, 40, 70, 0] if max(rows) else [150]
    query, key, value, group, starts = random_images(lens, rows, heads=(8, 2), head_dim=8, dtype=torch.bfloat16)
    run_shared(query, key, value, group, starts, softmax_scale=0.3, backend="triton")
    wanted = torch.zeros(len(key), dtype=torch.long)
    for image in set(rows) - {-1}:
        wanted[starts[image] : starts[image + 1]] = 1
    for tensor in (key, value):
        assert torch.equal(loads(tensor), wanted[:, None, None].expand(tensor.shape))


@interpreted
@pytest.mark.parametrize("window", [0, 1, 37])
@pytest.mark.parametrize("grouped", [True, False])
def test_shared_pages_are_read_once_per_group(small, loads, grouped, window):
    """And no key that no query sees. With a window, those share a prefix whose queries are all behind it."""
    torch.manual_seed(1)
    lens, counts = [70, 65, 66, 90] if window else [70, 64, 65, 90], [1, 1, 2, 1]
    problem = Problem.random(lens, counts, prefix=64, head_dim=8, dtype=torch.float16)
    hints = {"prefix_group": int32(0, 0, 0, 0), "prefix_lens": int32(64)} if grouped else {}
    problem.run("triton", window, **hints)
    wanted = torch.zeros(problem.key_cache.shape[:2], dtype=torch.long)
    for sequence, (length, count) in enumerate(zip(lens, counts)):
        for token in range(max(0, length - count - window + 1) if window else 0, length):
            slot = problem.page_table[sequence, token // 16], token % 16
            wanted[slot] = 1 if grouped else wanted[slot] + 1
    for cache in (problem.key_cache, problem.value_cache):
        assert torch.equal(loads(cache), wanted[..., None, None].expand(cache.shape))


@interpreted
def test_launches(monkeypatch, launches):
    torch.manual_seed(2)
    problem = Problem.random([600] * 8, [1] * 8, prefix=512, heads=(2, 1), head_dim=8)
    hints = {"prefix_group": int32(*[0] * 8), "prefix_lens": int32(512)}
    problem.run("triton", **hints)
    assert launches == ["_group_queries", "_attend_paged", "_merge"]
    launches.clear()
    problem.run("triton")
    assert launches == ["_attend_paged", "_merge"]
    launches.clear()
    problem.run("triton", 60, **hints)  # a window with too little to share, and of no more than one split
    assert launches == ["_attend_paged"]
    launches.clear()
    few = Problem.random([60] * 8, [1] * 8, prefix=48, heads=(2, 1), head_dim=8)
    few.run("triton", prefix_group=int32(*[0] * 8), prefix_lens=int32(48))  # too little to share, and a single split
    assert launches == ["_attend_paged"]
    launches.clear()
    images = random_images([300, 20], [0, 1, 0])
    run_shared(*images, softmax_scale=0.3, backend="triton")
    assert launches == ["_group_queries", "_attend_image", "_merge"]
    launches.clear()
    run_shared(*random_images([300], [0, 0, -1]), softmax_scale=0.3, backend="triton")
    assert launches == ["_attend_image", "_merge"]


@pytest.mark.parametrize(
    ("num_tiles", "kv_heads", "max_keys", "split_keys"),
    [
        (1, 8, 768, 64),  # 96 programs
        (1, 8, 4096, 128),  # 256
        (1, 8, 8192, 256),  # 256
        (3, 8, 768, 128),  # 144
        (6, 8, 768, 256),  # 144
        (1, 1, 0, 64),
    ],
)
def test_few_tiles_have_short_splits(num_tiles, kv_heads, max_keys, split_keys):
    assert kernels.choose_split(num_tiles * kv_heads, max_keys) == split_keys


@pytest.mark.parametrize("window", [0, 300])
@pytest.mark.parametrize("programs", [1, 6, 132])
def test_every_length_of_a_split_is_right(monkeypatch, programs, window):
    """By what would fill a GPU, the splits of these two sequences have 256, 128 or 64 keys."""
    torch.manual_seed(14)
    monkeypatch.setattr(kernels, "FILLING_PROGRAMS", programs)
    problem = Problem.random([650, 250], [1, 1], prefix=208, heads=(2, 1), head_dim=8)
    got = problem.run("triton", window)
    torch.testing.assert_close(got, problem.run("reference", window), rtol=1e-5, atol=1e-6)
    monkeypatch.setattr(kernels, "SHARING_PAYS", ((1, 0),))
    hints = {"prefix_group": int32(0, 0), "prefix_lens": int32(208)}
    assert same(problem.run("triton", window, **hints), got)


def test_sharing_pays_from_the_table_on():
    assert not kernels.sharing_pays(16, 0, 4096)
    assert not kernels.sharing_pays(16, 1, 255)
    assert kernels.sharing_pays(16, 1, 256)
    assert not kernels.sharing_pays(16, 4, 512)
    assert kernels.sharing_pays(16, 4, 1024)
    assert not kernels.sharing_pays(16, 16, 1 << 20)


@pytest.mark.parametrize("window", [0, 3, 40])
@pytest.mark.parametrize("dtype", TILES)
def test_the_prefix_hint_changes_no_bit(small, dtype, window):
    """Nor does a wrong one: all share 64 tokens, whatever it says, but for 3 and 4, which have theirs elsewhere."""
    torch.manual_seed(3)
    lens, counts = [70, 65, 64, 90, 75, 33], [1, 1, 5, 1, 2, 1]
    problem = Problem.random(lens, counts, prefix=64, heads=(4, 1), head_dim=16, dtype=dtype)
    problem.page_table[3:5] = problem.page_table[3].flip(0)
    expected = without_nan(problem).run("triton", window)
    everyone, mixed, sparse = int32(0, 0, 0, 0, 0, 0), int32(0, 1, 0, 1, 1, 0), int32(1, -1, 1, -1, 0, 1)
    for groups, prefix_len in [(everyone, 31), (everyone, 10_000), (everyone, -300), (mixed, 64), (sparse, 50)]:
        hints = {"prefix_group": groups, "prefix_lens": int32(prefix_len, prefix_len)}
        assert same(problem.run("triton", window, **hints), expected)


@pytest.mark.parametrize("window", [1, 20, 33, 100])
def test_windows_that_are_far_apart_in_one_group(small, window):
    """Those that have not all of the prefix in front of them do not share: a tile has programs for one window."""
    torch.manual_seed(13)
    lens, counts = [40, 300, 293, 150, 60], [1, 3, 1, 1, 30]
    problem = without_nan(Problem.random(lens, counts, prefix=288, heads=(2, 1), head_dim=16, dtype=torch.bfloat16))
    got = problem.run("triton", window, prefix_group=int32(0, 0, 0, 0, 0), prefix_lens=int32(288))
    assert same(got, problem.run("triton", window))
    expected = problem.run("reference", window)
    torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("window", [0, 50])
@pytest.mark.parametrize("dtype", TILES)
def test_a_large_group_of_several_tiles(small, dtype, window):
    torch.manual_seed(4)
    problem = Problem.random([75] * 10 + [0, 90], [1] * 11 + [7], prefix=64, heads=(17, 1), head_dim=16, dtype=dtype)
    groups = int32(*[1, 0] * 5, 0, 1)
    got = problem.run("triton", window, prefix_group=groups, prefix_lens=int32(64, 64))
    assert same(got, problem.run("triton", window))


def test_a_sequence_alone_has_the_same_bits(small):
    torch.manual_seed(5)
    problem = Problem.random([70, 91, 77, 100], [1, 1, 1, 1], prefix=64, heads=(4, 1), dtype=torch.bfloat16)
    hints = {"prefix_group": int32(0, -1, 0, 0), "prefix_lens": int32(64)}
    out, lse = problem.run("triton", **hints)
    for rows in ([2], [3, 0], [1, 3, 2, 0]):
        some = Problem(
            problem.query[rows], problem.key_cache, problem.value_cache, problem.page_table[rows],
            problem.seq_lens[rows], torch.arange(len(rows) + 1).int(), problem.softmax_scale,
        )  # fmt: skip
        group = hints["prefix_group"][rows]
        got = some.run("triton", prefix_group=group, prefix_lens=hints["prefix_lens"])
        assert same(got, (out[rows], lse[rows])) and same(some.run("triton"), got)


@pytest.mark.parametrize("window", [0, 10])
def test_chunks_walks_through_splits_and_merges_of_few_heads_change_no_bit(small, monkeypatch, window):
    """The first sequence is a whole prompt, and the second a chunk of 5 queries behind 32 cached keys."""
    torch.manual_seed(6)
    monkeypatch.setattr(kernels, "SPLIT_KEYS", (16,))
    whole = Problem.random([37, 37], [37, 5], prefix=32, page_size=8, heads=(5, 1), head_dim=16, dtype=torch.bfloat16)
    expected = whole.run("triton", window)
    for name, value in {"ENOUGH_PROGRAMS": 1, "MAX_SCRATCH_BYTES": 0, "MERGE_VALUES": 32}.items():
        with monkeypatch.context() as patch:
            patch.setattr(kernels, name, value)
            assert same(whole.run("triton", window), expected)
    for position, other in ((0, 32), (15, 33), (16, 34), (17, 35), (36, 36)):
        rows = [position, 5 + other]
        last = Problem(
            whole.query[rows], whole.key_cache, whole.value_cache, whole.page_table,
            int32(position + 1, other + 1), int32(0, 1, 2), whole.softmax_scale,
        )  # fmt: skip
        assert same(last.run("triton", window), [result[rows] for result in expected])


@pytest.mark.parametrize("dtype", TILES)
def test_neither_neighbours_nor_slots_change_a_bit_of_image_attention(small, monkeypatch, dtype):
    torch.manual_seed(7)
    rows = [1, 0, -1, 1, 2, 1, 0, 0, 0, 0]
    query, key, value, group, starts = random_images([130, 77, 1], rows, heads=(10, 1), head_dim=16, dtype=dtype)
    out, lse = run_shared(query, key, value, group, starts, softmax_scale=0.3, backend="triton")
    order = torch.randperm(len(rows))
    shuffled = run_shared(query[order], key, value, group[order], starts, softmax_scale=0.3, backend="triton")
    assert same(shuffled, (out[order], lse[order]))
    for image in range(3):
        mine = (group == image).nonzero()[:, 0]
        keys = slice(starts[image], starts[image + 1])
        alone = torch.tensor([0, keys.stop - keys.start])
        for rows in (mine, mine[-1:]):
            got = run_shared(
                query[rows], key[keys], value[keys], int32(*[0] * len(rows)), alone, softmax_scale=0.3, backend="triton"
            )
            assert same(got, (out[rows], lse[rows]))
    monkeypatch.setattr(kernels, "ENOUGH_PROGRAMS", 1)
    assert same(run_shared(query, key, value, group, starts, softmax_scale=0.3, backend="triton"), (out, lse))


@pytest.mark.parametrize("num_keys", [1, 127, 128, 129, 2047, 2048, 2049])
def test_an_image_is_split_into_at_most_so_many(num_keys):
    torch.manual_seed(8)
    query, key, value, group, starts = random_images([num_keys], [0, 0], heads=(2, 1), head_dim=8)
    got = run_shared(query, key, value, group, starts, softmax_scale=0.3, backend="triton")
    expected = run_shared(query, key, value, group, starts, softmax_scale=0.3, backend="reference")
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_a_sequence_with_nan_spoils_no_other(small):
    torch.manual_seed(9)
    problem = Problem.random([90, 95, 91], [1, 1, 1], prefix=64)
    hints = {"prefix_group": int32(0, 0, 0), "prefix_lens": int32(64)}
    expected, _ = problem.run("triton", **hints)
    problem.value_cache[problem.page_table[1, 4], 3] = torch.nan
    got, _ = problem.run("triton", **hints)
    assert got[1].isnan().all()
    assert torch.equal(got[[0, 2]], expected[[0, 2]])


def test_ops_fill_poisoned_outputs_and_pass_opcheck(small):
    torch.manual_seed(10)
    ops = torch.ops.llava_cot_kernels_triton
    problem = without_nan(Problem.random([40, 35, 0, 3], [1, 2, 1, 5], prefix=32, heads=(2, 1)))
    for *hints, window in ((None, None, 0), (int32(0, 0, -1, -1), int32(32), 0), (None, None, 9)):
        out, lse = torch.full(problem.query.shape, torch.nan), torch.full(problem.query.shape[:2], torch.nan)
        arguments = [
            problem.query, problem.key_cache, problem.value_cache, problem.page_table, problem.seq_lens,
            problem.cu_seqlens_q, *hints, problem.softmax_scale, window, out, lse,
        ]  # fmt: skip
        arguments = [value.to(DEVICE) if isinstance(value, torch.Tensor) else value for value in arguments]
        ops.paged_attention(*arguments)
        assert same([result.cpu() for result in arguments[-2:]], problem.run("triton", window))
        torch.library.opcheck(ops.paged_attention.default, tuple(arguments))
    images = random_images([70, 9], [1, 0, -1, 0])
    out, lse = torch.full(images[0].shape, torch.nan), torch.full(images[0].shape[:2], torch.nan)
    arguments = [tensor.to(DEVICE) for tensor in images] + [0.2] + [tensor.to(DEVICE) for tensor in (out, lse)]
    ops.shared_attention(*arguments)
    assert same([r.cpu() for r in arguments[-2:]], run_shared(*images, softmax_scale=0.2, backend="triton"))
    torch.library.opcheck(ops.shared_attention.default, tuple(arguments))


@pytest.mark.parametrize("window", [0, 50])
def test_a_captured_graph_follows_its_inputs(small, capture, window):
    """Without a GPU the launches are recorded: as in a graph, only what they read may differ when they run."""
    torch.manual_seed(11)
    problem = Problem.random([140, 129, 128, 170], [1, 1, 1, 1], prefix=128)
    tensors = (problem.query, problem.key_cache, problem.value_cache, problem.page_table, problem.seq_lens)
    tensors = [tensor.to(DEVICE) for tensor in tensors]
    hints = {"prefix_group": int32(0, 0, 0, 0).to(DEVICE), "prefix_lens": int32(128).to(DEVICE)}
    query, key, value, group, starts = (x.to(DEVICE) for x in random_images([300, 77], [1, 0, -1, 0]))

    def run():
        text = paged_attention(*tensors, softmax_scale=0.2, window=window, backend="triton", **hints)
        return text, shared_attention(query, key, value, group, starts, softmax_scale=0.2, backend="triton")

    results, replay = capture(run)
    hints["prefix_group"].copy_(int32(0, -1, 0, -1))
    tensors[4].copy_(int32(5, 100, 128, 64))
    group.copy_(int32(0, 0, 1, -1))
    replay()
    assert same(results, run())


def test_offsets_beyond_31_bits():
    torch.manual_seed(12)
    num_pages = (1 << 31) // (16 * 2 * 64) + 2
    caches = torch.empty(2, num_pages, 16, 2, 64, dtype=torch.bfloat16, device=DEVICE)  # untouched: no memory
    caches[:, -2:] = torch.randn(2, 2, 16, 2, 64)
    query = torch.randn(1, 4, 64, device=DEVICE).bfloat16()
    table = torch.tensor([[num_pages - 1, num_pages - 2]], dtype=torch.int32, device=DEVICE)
    lens = torch.tensor([32], dtype=torch.int32, device=DEVICE)
    few = caches[:, -2:].contiguous()
    got = paged_attention(query, *caches, table, lens, softmax_scale=0.1, backend="triton")
    expected = paged_attention(query, *few, table - num_pages + 2, lens, softmax_scale=0.1, backend="triton")
    assert torch.equal(got, expected)
