"""store_kv and copy_pages move data: exact, and nothing else is touched."""

import pytest
import torch
from helpers import fibers

from llava_cot_kernels.checks import FLOATS
from llava_cot_kernels.page_pool import PagePool
from llava_cot_kernels.paged_kv import copy_pages, store_kv


def random_cache(*shape, dtype):
    """A kv_cache, of which one layer's views start at an offset."""
    return torch.randn(2, 3, *shape).to(dtype)


def expected_after_store(key, value, cache, layer, slots):
    expected = cache.clone()
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            page, offset = divmod(slot, cache.shape[3])
            expected[0, layer, page, offset] = key[token]
            expected[1, layer, page, offset] = value[token]
    return expected


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("num_tokens", "num_pages", "page_size", "num_kv_heads", "head_dim"),
    [(12, 5, 4, 2, 8), (1, 1, 1, 1, 1), (17, 7, 3, 3, 5), (16, 2, 16, 1, 64), (0, 3, 4, 2, 8), (31, 40, 1, 2, 7)],
)
def test_store_kv(backend, dtype, num_tokens, num_pages, page_size, num_kv_heads, head_dim):
    torch.manual_seed(num_tokens)
    cache = random_cache(num_pages, page_size, num_kv_heads, head_dim, dtype=dtype)
    slots = torch.randperm(max(num_pages * page_size, num_tokens))[:num_tokens]
    slots[slots >= num_pages * page_size] = -1
    slots[::5] = -1
    fused = torch.randn(num_tokens, 2 * num_kv_heads * head_dim + 3).to(dtype)  # as a fused projection gives them
    key, value = fused[:, 3:].view(num_tokens, 2, num_kv_heads, head_dim).unbind(1)
    expected = expected_after_store(key, value, cache, 1, slots)
    store_kv(key, value, cache[0, 1], cache[1, 1], slots, backend=backend)
    assert torch.equal(cache, expected)


def test_store_kv_reads_heads_at_any_stride(backend):
    torch.manual_seed(0)
    cache = random_cache(4, 4, 3, 8, dtype=torch.float32)
    key = torch.randn(3, 10, 8).transpose(0, 1)
    value = torch.randn(10, 3, 16)[..., 4:12]
    slots = torch.tensor([3, 15, 0, 1, -1, 2, 7, -1, 9, 8])
    expected = expected_after_store(key, value, cache, 2, slots)
    store_kv(key, value, cache[0, 2], cache[1, 2], slots, backend=backend)
    assert torch.equal(cache, expected)


def test_store_kv_and_copy_pages_with_two_threads():
    torch.manual_seed(0)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        cache = random_cache(64, 16, 2, 64, dtype=torch.bfloat16)
        key, value = torch.randn(2, 1000, 2, 64).bfloat16()
        slots = torch.randperm(1024)[:1000]
        expected = expected_after_store(key, value, cache, 0, slots)
        store_kv(key, value, cache[0, 0], cache[1, 0], slots, backend="native")
        assert torch.equal(cache, expected)
        pages = torch.randperm(64).int()
        copies = torch.stack([pages[:30], pages[30:60]], 1)
        expected[:, :, copies[:, 1].long()] = expected[:, :, copies[:, 0].long()]
        copy_pages(cache, copies, backend="native")
        assert torch.equal(cache, expected)
    finally:
        torch.set_num_threads(num_threads)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("copies", [[[0, 3]], [[2, 0], [2, 4], [2, 1], [6, 5]], []])
def test_copy_pages(backend, dtype, copies):
    torch.manual_seed(1)
    cache = random_cache(7, 3, 2, 5, dtype=dtype)
    expected = cache.clone()
    for source, target in copies:
        expected[:, :, target] = cache[:, :, source]
    copy_pages(cache, torch.tensor(copies, dtype=torch.int32).reshape(-1, 2), backend=backend)
    assert torch.equal(cache, expected)


def test_a_fork_diverges_without_touching_its_siblings(backend):
    torch.manual_seed(2)
    pool = PagePool(16, 4)
    cache = random_cache(16, 4, 1, 2, dtype=torch.float32)
    parent = pool.create()
    tokens = torch.randn(6, 1, 2)
    store_kv(tokens, -tokens, cache[0, 0], cache[1, 0], pool.append([parent], [6])[0], backend=backend)
    kids = pool.fork(parent, 3)
    new = torch.randn(4, 1, 2)
    slots, copies = pool.append([parent, *kids], [1] * 4)
    copy_pages(cache, copies, backend=backend)
    store_kv(new, -new, cache[0, 0], cache[1, 0], slots, backend=backend)
    for i, pages in enumerate(pool.page_table([parent, *kids]).long()):
        assert torch.equal(cache[0, 0, pages].flatten(0, 1)[:7], torch.cat([tokens, new[i : i + 1]]))
        assert torch.equal(cache[1, 0, pages].flatten(0, 1)[:7], -torch.cat([tokens, new[i : i + 1]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_moves_each_byte_once(dtype):
    """One launch each; beside the data, a warp reads its page numbers or its slot once."""
    cache = random_cache(8, 16, 8, 64, dtype=dtype)
    copies = torch.tensor([[0, 5], [1, 4], [0, 7]], dtype=torch.int32)
    moved = 6 * 3 * cache[0, 0, 0].numel() * cache.element_size()
    with fibers.counting() as counted:
        fibers.ops().copy_pages(cache, copies)
    assert (counted.launches, counted.bytes_written) == (1, moved)
    assert moved <= counted.bytes_read <= 1.01 * moved
    key, value = torch.randn(2, 30, 8, 64).to(dtype)
    moved = 2 * key.numel() * key.element_size()
    with fibers.counting() as counted:
        fibers.ops().store_kv(key, value, cache[0, 1], cache[1, 1], torch.arange(30))
    assert (counted.launches, counted.bytes_written) == (1, moved)
    assert moved <= counted.bytes_read <= 1.07 * moved


def test_cuda_skips_what_is_out_of_range():
    cache = random_cache(4, 4, 2, 8, dtype=torch.float32)
    before, rows = cache.clone(), torch.zeros(2, 2, 8)
    fibers.ops().copy_pages(cache, torch.tensor([[0, 4], [-1, 2], [9, 9]], dtype=torch.int32))
    fibers.ops().store_kv(rows, rows, cache[0, 1], cache[1, 1], torch.tensor([16, -2]))
    assert torch.equal(cache, before)


def test_opcheck():
    cache = random_cache(4, 4, 2, 8, dtype=torch.float32)
    key, value = torch.randn(2, 5, 2, 8)
    layer = cache[0, 1].clone(), cache[1, 1].clone()
    torch.library.opcheck(
        torch.ops.llava_cot_kernels.store_kv.default, (key, value, *layer, torch.tensor([3, -1, 0, 15, 7]))
    )
    copies = torch.tensor([[0, 3], [0, 2]], dtype=torch.int32)
    torch.library.opcheck(torch.ops.llava_cot_kernels.copy_pages.default, (cache, copies))


@pytest.mark.parametrize("backend", ["auto", "native", "reference"])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"slot_mapping": torch.zeros(4, dtype=torch.int64)}, ValueError, "slot_mapping must have T=5 in .*, got 4"),
        ({"slot_mapping": torch.zeros(5, dtype=torch.int32)}, TypeError, "slot_mapping must be int64, got int32"),
        ({"slot_mapping": torch.full((5,), 16)}, ValueError, r"slot_mapping must be in \[-1, 15\], got 16"),
        ({"slot_mapping": torch.full((5,), -2)}, ValueError, r"slot_mapping must be in \[-1, 15\], got -2"),
        ({"value": torch.zeros(5, 3, 8)}, ValueError, "value must have Hkv=2 in dimension 1, got 3"),
        ({"value": torch.zeros(5, 2, 8).half()}, TypeError, "value must be float32, got float16"),
        ({"key": torch.zeros(5, 8, 2).mT}, ValueError, "key must have stride 1 in its last dimension"),
        ({"key_cache": torch.zeros(4, 4, 2, 9)}, ValueError, "key_cache must have D=8 in dimension 3, got 9"),
        ({"value_cache": torch.zeros(4, 2, 4, 8).transpose(1, 2)}, ValueError, "value_cache must be contiguous"),
    ],
)  # fmt: skip
def test_store_kv_errors(backend, change, error, message):
    arguments = {
        "key": torch.zeros(5, 2, 8),
        "value": torch.zeros(5, 2, 8),
        "key_cache": torch.zeros(4, 4, 2, 8),
        "value_cache": torch.zeros(4, 4, 2, 8),
        "slot_mapping": torch.arange(5),
    }
    with pytest.raises(error, match=message):
        store_kv(**{**arguments, **change}, backend=backend)
    with pytest.raises(ValueError, match=r"backend of store_kv on cpu must be one of .*, got 'triton'"):
        store_kv(**arguments, backend="triton")


def test_copy_pages_errors():
    cache = random_cache(4, 4, 2, 8, dtype=torch.float32)
    for copies, error, message in [
        (torch.tensor([[0, 4]], dtype=torch.int32), ValueError, r"copies must be in \[0, 3\], got 4"),
        (torch.tensor([[0, 1]]), TypeError, "copies must be int32, got int64"),
        (torch.tensor([0, 1], dtype=torch.int32), ValueError, r"copies must have shape \[m, 2\], got \[2\]"),
    ]:
        with pytest.raises(error, match=message):
            copy_pages(cache, copies)
    with pytest.raises(ValueError, match="kv_cache must be contiguous"):
        copy_pages(cache[..., :4], torch.tensor([[0, 1]], dtype=torch.int32))


def test_the_ops_themselves_refuse_what_would_leave_memory():
    ops = torch.ops.llava_cot_kernels
    cache, rows = torch.zeros(4, 4, 2, 8), torch.zeros(1, 2, 8)
    with pytest.raises(RuntimeError, match=r"slot_mapping must be in \[-1, 15\], got 16"):
        ops.store_kv(rows, rows, cache, cache.clone(), torch.tensor([16]))
    with pytest.raises(RuntimeError, match=r"copies must be in \[0, 3\], got -1"):
        ops.copy_pages(torch.zeros(2, 1, 4, 4, 2, 8), torch.tensor([[0, -1]], dtype=torch.int32))
