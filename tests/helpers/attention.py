"""Problems for paged and shared attention, and PyTorch's own answer to them."""

from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention

from llava_cot_kernels.attention import paged_attention, shared_attention


def device_of(backend):
    """Triton's kernels run interpreted on a machine without a GPU, and compiled on one."""
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


@dataclass
class Problem:
    """Sequences in randomly placed pages; every slot that no sequence uses holds NaN."""

    query: torch.Tensor
    key_cache: torch.Tensor
    value_cache: torch.Tensor
    page_table: torch.Tensor
    seq_lens: torch.Tensor
    cu_seqlens_q: torch.Tensor
    softmax_scale: float

    @classmethod
    def random(cls, lens, counts, *, prefix=0, page_size=16, heads=(4, 2), head_dim=32, dtype=torch.float32):
        """Sequences of ``lens`` keys and ``counts`` queries; the pages of the first ``prefix`` tokens are shared."""
        width = max(1, *(-(-length // page_size) for length in lens))
        shared_pages = prefix // page_size
        num_pages = shared_pages + len(lens) * width + 3
        order = torch.randperm(num_pages).int()
        page_table = torch.zeros(len(lens), width, dtype=torch.int32)
        caches = torch.full((2, num_pages * page_size, heads[1], head_dim), torch.nan, dtype=dtype)
        for sequence, length in enumerate(lens):
            used = -(-length // page_size)
            first_own = shared_pages + sequence * width
            row = torch.cat([order[:shared_pages], order[first_own : first_own + width]])[:used]
            page_table[sequence, :used] = row
            slots = (row.long()[:, None] * page_size + torch.arange(page_size)).flatten()[:length]
            fresh = caches[:, slots].isnan()
            caches[:, slots] = torch.where(
                fresh, torch.randn(2, length, heads[1], head_dim).to(dtype), caches[:, slots]
            )
        starts = torch.tensor([0, *counts]).cumsum(0).int()
        packed = torch.randn(sum(counts), 2 * heads[0], head_dim).to(dtype)
        key_cache, value_cache = caches.view(2, num_pages, page_size, heads[1], head_dim)
        lens = torch.tensor(lens, dtype=torch.int32)
        return cls(packed[:, : heads[0]], key_cache, value_cache, page_table, lens, starts, head_dim**-0.5)

    def without_keys_before(self, window):
        """Put NaN in front of the windows of all queries of a sequence, and of those that share its first page."""
        page_size, counts = self.key_cache.shape[1], self.cu_seqlens_q.diff().tolist()
        pages, lens = self.page_table[:, 0].tolist(), self.seq_lens.tolist()
        for sequence in range(len(lens)):
            together = [other for other, page in enumerate(pages) if lens[other] and page == pages[sequence]]
            index = torch.arange(min((max(0, lens[s] - counts[s] - window + 1) for s in together), default=0))
            slots = self.page_table[sequence].long()[index // page_size] * page_size + index % page_size
            self.key_cache.flatten(0, 1)[slots] = self.value_cache.flatten(0, 1)[slots] = torch.nan
        return self

    def run(self, backend="native", window=0, **hints):
        device = device_of(backend)
        tensors = (self.query, self.key_cache, self.value_cache, self.page_table, self.seq_lens)
        results = paged_attention(
            *(tensor.to(device) for tensor in tensors),
            softmax_scale=self.softmax_scale,
            cu_seqlens_q=self.cu_seqlens_q.to(device),
            window=window,
            return_lse=True,
            backend=backend,
            **{name: hint.to(device) for name, hint in hints.items()},
        )
        return tuple(result.cpu() for result in results)

    def dense(self, dtype, window=0):
        """PyTorch's attention, a query at a time."""
        out = torch.zeros(self.query.shape, dtype=dtype)
        lse = torch.full(self.query.shape[:2], -torch.inf, dtype=dtype)
        page_size = self.key_cache.shape[1]
        starts = self.cu_seqlens_q.tolist()
        for sequence, length in enumerate(self.seq_lens.tolist()):
            slots = self.page_table[sequence].long()[:, None] * page_size + torch.arange(page_size)
            slots = slots.flatten()[:length]
            key, value = self.key_cache.flatten(0, 1)[slots], self.value_cache.flatten(0, 1)[slots]
            for token in range(starts[sequence], starts[sequence + 1]):
                seen = length - (starts[sequence + 1] - 1 - token)
                if seen > 0:
                    keys = slice(max(0, seen - window) if window else 0, seen)
                    out[token], lse[token] = dense(
                        self.query[token].to(dtype), key[keys].to(dtype), value[keys].to(dtype), self.softmax_scale
                    )
        return out, lse


def dense(query, key, value, scale):
    """``[Hq, D]`` against ``[s, Hkv, D]``."""
    key, value = (x.transpose(0, 1).repeat_interleave(query.shape[0] // key.shape[1], 0) for x in (key, value))
    out = scaled_dot_product_attention(query[:, None], key, value, scale=scale)[:, 0]
    return out, (query[:, None] @ key.mT * scale)[:, 0].logsumexp(-1)


def assert_close(got, plain, exact, score_size=1.0):
    """``plain`` is PyTorch's result in the dtype of ``got``, ``exact`` the one in float64.

    Rounding a score of size s shifts a weight by s * eps: where scores are far from 1, the floor must say so.
    """
    eps = torch.finfo(got.dtype).eps
    idle = exact.isneginf()
    assert torch.equal(got.isneginf(), idle)
    if not got.numel():
        return
    got, plain, exact = (torch.where(idle, 0, x.double()) for x in (got, plain, exact))
    error, plain_error = (got - exact).abs().max().item(), (plain - exact).abs().max().item()
    allowed = 2 * plain_error + eps * score_size * exact.abs().max().item()
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


def check(problem, backend, score_size=1.0, window=0, **hints):
    out, lse = problem.run(backend, window, **hints)
    assert out.dtype == problem.query.dtype and lse.dtype == torch.float32
    plain = {dtype: problem.dense(dtype, window) for dtype in {out.dtype, lse.dtype, torch.float64}}
    exact, exact_lse = plain[torch.float64]
    assert_close(out, plain[out.dtype][0], exact, score_size)
    assert_close(lse, plain[lse.dtype][1], exact_lse)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def random_images(lens, groups, *, heads=(4, 2), head_dim=32, dtype=torch.float32):
    """Keys and values as slices of one bigger buffer; images without rows hold NaN."""
    starts = torch.tensor([0, *lens]).cumsum(0)
    buffer = torch.randn(int(starts[-1]) + 2, 3, heads[1] + 1, head_dim).to(dtype)
    for image in set(range(len(lens))) - set(groups):
        buffer[starts[image] : starts[image + 1]] = torch.nan
    query = torch.randn(len(groups), heads[0], 2 * head_dim).to(dtype)[..., head_dim:]
    return query, buffer[:, 0, 1:], buffer[:, 2, :-1], int32(*groups), starts


def run_shared(query, key, value, group, starts, *, softmax_scale, backend):
    """Output and lse. Views keep their strides on the CPU; on a device they are dense."""
    tensors = (tensor.to(device_of(backend)) for tensor in (query, key, value, group, starts))
    results = shared_attention(*tensors, softmax_scale=softmax_scale, return_lse=True, backend=backend)
    return tuple(result.cpu() for result in results)
