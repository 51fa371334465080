"""Time paged_attention and shared_attention beside PyTorch and FlashInfer: ``python benchmarks/bench_attention.py``."""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from timing import Case, main
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from llava_cot_kernels.attention import paged_attention, shared_attention
from llava_cot_kernels.backend import available

HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE = 32, 8, 128, 16  # Llama 3.2 Vision 11B
SCALE = HEAD_DIM**-0.5
# (candidates, shared tokens, private tokens of each, sliding window or 0), and (candidates, keys of the image, which
# has 1601 per tile).
SMALL_PAGED = [(4, 64, 16, 0)]
PAGED = [(16, 1024, 32, 0), (1, 1024, 32, 0), (4, 1024, 128, 0), (16, 256, 32, 0), (64, 1024, 128, 0)]
PAGED += [(16, 4064, 32, 0), (16, 4064, 32, 512), (1, 4064, 32, 0), (1, 4064, 32, 512)]
SMALL_IMAGES, IMAGES = [(4, 101)], [(N, keys) for keys in (1601, 6404) for N in (1, 4, 16)]
# Errors against float64 of an output whose values are about 1.
MAX_ERROR = {torch.float32: 1e-5, torch.bfloat16: 2e-2}

Providers = dict[str, Callable[[], Any]]


def cases(device: str, report: bool) -> Iterator[Case]:
    dtypes = [torch.bfloat16] if device == "cuda" else [torch.float32]
    if report and device == "cpu":
        dtypes.append(torch.bfloat16)
    for dtype in dtypes:
        for shape in PAGED if report else SMALL_PAGED:
            yield paged_case(*shape, dtype, device)
        for shape in IMAGES if report else SMALL_IMAGES:
            yield image_case(*shape, dtype, device)


def paged_case(N: int, shared: int, private: int, window: int, dtype: torch.dtype, device: str) -> Case:
    """Attend for one new token of each of ``N`` candidates that were forked after ``shared`` tokens in shared pages.

    The peers of a window longer than ``private`` get the keys in the window alone.
    """
    own = private // PAGE_SIZE
    prefix = torch.arange(shared // PAGE_SIZE)
    page_table = torch.stack([torch.cat([prefix, len(prefix) + n * own + torch.arange(own)]) for n in range(N)])
    page_table = page_table.int().to(device)
    num_pages = len(prefix) + N * own
    key_cache, value_cache = torch.randn(2, num_pages, PAGE_SIZE, KV_HEADS, HEAD_DIM, device=device).to(dtype)
    query = torch.randn(N, HEADS, HEAD_DIM, device=device).to(dtype)
    seq_lens = torch.full((N,), shared + private, dtype=torch.int32, device=device)
    arguments = (query, key_cache, value_cache, page_table, seq_lens)
    hints = {
        "prefix_group": torch.zeros(N, dtype=torch.int32, device=device),
        "prefix_lens": torch.tensor([shared], dtype=torch.int32, device=device),
    }

    def ours(backend: str, **hints) -> Callable[[], Tensor]:
        return lambda: paged_attention(*arguments, softmax_scale=SCALE, window=window, backend=backend, **hints)

    # Caches [N, Hkv, tokens, D] that are built beforehand, as a model without pages has them.
    seen = window or shared + private
    key, value = (
        x[page_table.long()].flatten(1, 2)[:, -seen:].transpose(1, 2).contiguous() for x in (key_cache, value_cache)
    )
    providers: Providers = reference(ours("reference"), device)
    for backend in available("paged_attention", device)[:-1]:
        if (backend, device) != ("triton", "cpu"):  # the time of the interpreter means nothing
            providers |= {f"{backend}, no hint": ours(backend), backend: ours(backend, **hints)}
    providers["SDPA"] = lambda: scaled_dot_product_attention(query[:, :, None], key, value, enable_gqa=True)[:, :, 0]
    providers["cascade in torch"] = torch_cascade(query, key, value, seen - private)
    if device == "cuda" and not window:
        providers |= flashinfer_paged(*arguments[:3], page_table=page_table, shared=shared, private=private)
    read_once = 2 * (seen - private + N * private) * KV_HEADS * HEAD_DIM * key.element_size()
    name = f"N={N} shared={shared} private={private} {f'window={window} ' * bool(window)}{_name(dtype)}"
    return _case("paged_attention", name, providers, read_once, query, attend(query, key, value))


def image_case(N: int, num_keys: int, dtype: torch.dtype, device: str) -> Case:
    """Attend for one new token of each of ``N`` candidates of one image."""
    query = torch.randn(N, HEADS, HEAD_DIM, device=device).to(dtype)
    key, value = torch.randn(2, num_keys, KV_HEADS, HEAD_DIM, device=device).to(dtype)
    group = torch.zeros(N, dtype=torch.int32, device=device)
    cu_seqlens_k = torch.tensor([0, num_keys], device=device)
    arguments = (query, key, value, group, cu_seqlens_k)

    def ours(backend: str) -> Callable[[], Tensor]:
        return lambda: shared_attention(*arguments, softmax_scale=SCALE, backend=backend)

    dense = [x.transpose(0, 1)[None].contiguous() for x in (key, value)]  # [1, Hkv, keys, D]
    copies = [x.repeat(N, 1, 1, 1) for x in dense]  # one cache for each candidate, as in transformers' generate
    mask = torch.zeros(N, 1, 1, num_keys, dtype=dtype, device=device)  # this makes transformers repeat the heads

    def stacked() -> Tensor:
        rows = query.transpose(0, 1)[None]  # [1, Hq, N, D]
        return scaled_dot_product_attention(rows, *dense, enable_gqa=True)[0].transpose(0, 1)

    def expanded() -> Tensor:
        key, value = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in copies)
        return scaled_dot_product_attention(query[:, :, None], key, value, attn_mask=mask)[:, :, 0]

    providers: Providers = reference(ours("reference"), device)
    for backend in available("shared_attention", device)[:-1]:
        if (backend, device) != ("triton", "cpu"):
            providers[backend] = ours(backend)
    providers |= {"SDPA, stacked": stacked, "SDPA, repeat_kv + mask": expanded}
    if device == "cuda":
        providers |= flashinfer_ragged(query, key, value)
    read_once = 2 * key.numel() * key.element_size()
    name = f"N={N} keys={num_keys} {_name(dtype)}"
    return _case("shared_attention", name, providers, read_once, query, attend(query, *copies))


def _case(op: str, name: str, providers: Providers, read_once: int, query: Tensor, exact: Tensor) -> Case:
    def check() -> None:
        for provider, call in providers.items():
            error = (call().double() - exact).abs().max().item()
            bound = MAX_ERROR[query.dtype]
            assert error <= bound, f"{op}, {name}: {provider} is off by {error:.2g}, more than {bound:.2g}"

    return Case(op, name, providers, read_once + 2 * query.numel() * query.element_size(), check)


def reference(call: Callable[[], Tensor], device: str) -> Providers:
    """Return the reference, on a CPU compiled too. It reads lengths, so a GPU would unroll it for every sequence."""
    if device == "cuda":
        return {"reference": call}
    torch._dynamo.reset()  # each case is compiled for its own shapes only
    return {"reference": call, "torch.compile": torch.compile(call, dynamic=False)}


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend in float64: queries ``[N, Hq, D]``, keys and values ``[N, Hkv, tokens, D]``."""
    grouped = query.double().unflatten(1, (KV_HEADS, -1))
    weights = (grouped @ key.double().mT * SCALE).softmax(-1)
    return (weights @ value.double()).flatten(1, 2)


def torch_cascade(query: Tensor, key: Tensor, value: Tensor, shared: int) -> Callable[[], Tensor]:
    """Attend by cascade: stacked rows over the shared keys, single rows over the private ones, and a merge."""
    N, group = query.shape[0], HEADS // KV_HEADS
    shared_key, shared_value = (x[0, :, :shared].contiguous() for x in (key, value))
    own_key, own_value = (x[:, :, shared:].contiguous() for x in (key, value))

    def state(rows: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scores = (rows @ key.mT).float() * SCALE
        largest = scores.amax(-1, keepdim=True)
        weights = (scores - largest).exp()
        return largest, weights.sum(-1, keepdim=True), (weights.to(value.dtype) @ value).float()

    def call() -> Tensor:
        rows = query.view(N, KV_HEADS, group, HEAD_DIM)
        stacked = rows.transpose(0, 1).reshape(KV_HEADS, N * group, HEAD_DIM)
        states = (x.unflatten(1, (N, group)).transpose(0, 1) for x in state(stacked, shared_key, shared_value))
        (max_1, sum_1, out_1), (max_2, sum_2, out_2) = states, state(rows, own_key, own_value)
        largest = torch.maximum(max_1, max_2)
        scale_1, scale_2 = (max_1 - largest).exp(), (max_2 - largest).exp()
        out = (out_1 * scale_1 + out_2 * scale_2) / (sum_1 * scale_1 + sum_2 * scale_2)
        return out.flatten(1, 2).to(query.dtype)

    return call


@cache
def _flashinfer() -> Any:
    try:
        import flashinfer
    except ImportError as error:
        print(f"FlashInfer is not measured: {error}")
        return None
    return flashinfer


def flashinfer_paged(query: Tensor, *caches: Tensor, page_table: Tensor, shared: int, private: int) -> Providers:
    """Return FlashInfer's paged decode, which reads the prefix once per candidate, and its two-level cascade."""
    if (flashinfer := _flashinfer()) is None:
        return {}
    N, device = query.shape[0], query.device

    def int32(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    def offsets(each: int) -> Tensor:
        return torch.arange(N + 1, dtype=torch.int32, device=device) * each

    prefix_pages, own_pages = shared // PAGE_SIZE, private // PAGE_SIZE
    full = int32(*[PAGE_SIZE] * N)  # tokens in each last page
    sizes = (HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE)
    dtypes = {"sm_scale": SCALE, "q_data_type": query.dtype, "kv_data_type": query.dtype}
    decode = flashinfer.BatchDecodeWithPagedKVCacheWrapper(_workspace(device), "NHD", use_tensor_cores=True)
    decode.plan(offsets(page_table.shape[1]), page_table.flatten(), full, *sizes, **dtypes)
    cascade = flashinfer.MultiLevelCascadeAttentionWrapper(2, _workspace(device), "NHD")
    cascade.plan(
        [int32(0, N), offsets(1)],
        [int32(0, prefix_pages), offsets(own_pages)],
        [page_table[0, :prefix_pages].contiguous(), page_table[:, prefix_pages:].flatten()],
        [full[:1], full],
        *sizes,
        **dtypes,
    )
    return {
        "FlashInfer decode": lambda: decode.run(query, caches),
        "FlashInfer cascade": lambda: cascade.run(query, caches),
    }


def flashinfer_ragged(query: Tensor, key: Tensor, value: Tensor) -> Providers:
    """Return FlashInfer's prefill kernel without a mask: candidates are queries, and the image is the keys."""
    if (flashinfer := _flashinfer()) is None:
        return {}
    wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(_workspace(query.device), "NHD")
    ends = (torch.tensor([0, x.shape[0]], dtype=torch.int32, device=query.device) for x in (query, key))
    wrapper.plan(
        *ends, HEADS, KV_HEADS, HEAD_DIM, causal=False, sm_scale=SCALE,
        q_data_type=query.dtype, kv_data_type=query.dtype,
    )  # fmt: skip
    return {"FlashInfer prefill": lambda: wrapper.run(query, key, value)}


def _workspace(device: torch.device) -> Tensor:
    return torch.zeros(128 << 20, dtype=torch.uint8, device=device)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    main(cases, __doc__)
