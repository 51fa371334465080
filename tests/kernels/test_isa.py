"""Every table of CPU loops that this machine can run, one instruction set at a time."""

import pytest
import torch

from llava_cot_kernels import _C
from llava_cot_kernels.attention import paged_attention, shared_attention
from llava_cot_kernels.checks import FLOATS
from llava_cot_kernels.logprob import linear_logprobs, token_logprobs
from llava_cot_kernels.reference import logprob as reference_logprob
from llava_cot_kernels.sampling import sample

ISAS = _C.available_isas()


@pytest.fixture(autouse=True)
def the_choice_again(isa_of_run):
    yield
    _C.set_isa(isa_of_run)


@pytest.fixture(params=ISAS)
def isa(request):
    _C.set_isa(request.param)
    assert _C.isa() == request.param
    return request.param


def on_every_isa(function):
    results = []
    for name in ISAS:
        _C.set_isa(name)
        results.append(function())
    return results


def assert_as_exact_as_torch(got, plain, exact, score_size=1.0):
    """At most twice the error plain PyTorch makes in the same dtype, plus a floor of a few eps.

    Rounding a logsumexp of size s shifts probabilities by s * eps: where it is far from 1, the floor must say so.
    """
    eps = torch.finfo(torch.float32).eps
    floor = 4 * eps * score_size * exact.abs().max().clamp(min=1)
    if got.dtype != torch.float32:
        floor = floor + torch.finfo(got.dtype).eps * exact.abs().max()
    error, budget = (got.double() - exact).abs().max(), (plain.double() - exact).abs().max()
    assert error <= 2 * budget + floor, f"error {error:.3g}, plain PyTorch's {budget:.3g}, floor {floor:.3g}"


def test_the_choice(isa_of_run):
    assert ISAS[-1] == "baseline" and _C.isa() == isa_of_run
    with pytest.raises(ValueError, match=f"isa must be one that this CPU has \\({', '.join(ISAS)}\\), got sse9"):
        _C.set_isa("sse9")
    assert _C.isa() == isa_of_run


# ---- sampling: the same bits ----


def rows(kind: str, vocabulary: int, dtype: torch.dtype) -> torch.Tensor:
    """Logits whose threshold lies in a crowded bin, a sparse one, among ties, among all tokens, or at masked ones."""
    g = torch.Generator().manual_seed(vocabulary)
    logits = torch.randn(6, vocabulary, generator=g)
    if kind == "masked":
        logits = (logits * 4).masked_fill(torch.rand(logits.shape, generator=g) < 0.9, -torch.inf)
        logits[:, vocabulary // 2] = 1.0
    scale = {"flat": 0.01, "normal": 3.0, "peaked": 12.0, "equal": 0.0, "masked": 1.0, "tied": 2.0}[kind]
    logits = logits * scale
    return (logits.round() if kind == "tied" else logits).to(dtype)


FILTERS = [
    {"top_p": 0.9, "temperature": 0.6},
    {"top_p": 1e-6},
    {"top_p": 1 - 2**-24, "temperature": 1.9},
    {"top_k": 1},
    {"top_k": 37, "top_p": 0.5, "min_p": 0.01},
    {"min_p": 0.2, "temperature": 3.0},
    {"temperature": 0.0},
]


@pytest.mark.parametrize("kind", ["flat", "normal", "peaked", "equal", "masked", "tied"])
@pytest.mark.parametrize("vocabulary", [1, 17, 255, 257, 8209])
def test_samples_equal_the_reference_and_each_other(kind, vocabulary):
    for dtype in FLOATS:
        logits = rows(kind, vocabulary, dtype)
        for filters in FILTERS:
            draw = {**filters, "seed": torch.arange(6), "position": 5}
            first, *others = on_every_isa(lambda: sample(logits, **draw, backend="native"))  # noqa: B023
            for other in others:
                assert all(torch.equal(a, b) for a, b in zip(first, other))
            expected = sample(logits, **draw, backend="reference")
            assert torch.equal(first.token, expected.token), filters
            for name in ("logprob", "entropy", "sampling_logprob"):
                torch.testing.assert_close(getattr(first, name), getattr(expected, name), rtol=1e-6, atol=4e-6)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("position", [0, 31, 32, 40])
def test_bad_rows(isa, poison, position):
    """In whole vectors and in the rest of one."""
    logits = torch.full((2, 41), -torch.inf)
    logits[1, position] = 0.0
    logits[0, position] = poison
    with pytest.raises(ValueError, match="logits row 0 must have a finite largest value and no NaN"):
        sample(logits, seed=1, position=0, backend="native")
    assert sample(logits[1:], seed=1, position=0, temperature=0, backend="native").token.item() == position


# ---- log-probs and attention: the rule ----


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("T, V, H", [(3, 1, 1), (5, 37, 16), (1, 97, 2), (70, 4111, 61), (70, 4111, 130)])
def test_logprobs(isa, dtype, T, V, H):
    g = torch.Generator().manual_seed(T)
    hidden, weight = torch.randn(T, H, generator=g).to(dtype), (torch.randn(V, H, generator=g) * 3 / H**0.5).to(dtype)
    targets = torch.randint(V, (T,), generator=g)
    logits = (hidden @ weight.T * 4).to(dtype)
    assert_as_exact_as_torch(
        token_logprobs(logits, targets, backend="native"),
        torch.log_softmax(logits.float(), -1).gather(1, targets[:, None]).squeeze(1),
        reference_logprob.token_logprobs(logits.double(), targets),
    )

    def run(function, cast):
        inputs = [x.to(cast).detach().requires_grad_() for x in (hidden, weight)]
        outputs = function(*inputs, targets, temperature=0.7, entropy=True)
        return *outputs, *torch.autograd.grad(sum(out.sum() for out in outputs), inputs)

    lse = (hidden.double() @ weight.double().T / 0.7).logsumexp(1).abs().max().clamp(min=1)
    actual, plain = run(linear_logprobs, dtype), run(reference_logprob.linear_logprobs, dtype)
    for ours, theirs, truth in zip(actual, plain, run(reference_logprob.linear_logprobs, torch.float64)):
        assert_as_exact_as_torch(ours.detach(), theirs.detach(), truth.detach(), lse)


@pytest.mark.skipif(ISAS[0] != "avx512_bf16", reason="this CPU has no products of bfloat16")
def test_products_of_bfloat16_depend_on_no_thread_and_no_other_row():
    g = torch.Generator().manual_seed(3)
    hidden, weight = torch.randn(83, 96, generator=g).bfloat16(), torch.randn(2003, 96, generator=g).bfloat16()
    targets = torch.randint(2003, (83,), generator=g)

    def run(rows: slice = slice(None)):
        inputs = [hidden[rows].clone().requires_grad_(), weight.clone().requires_grad_()]
        outputs = linear_logprobs(*inputs, targets[rows], entropy=True)
        return *outputs, *torch.autograd.grad(sum(out.sum() for out in outputs), inputs)

    before = torch.get_num_threads()
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(run())
    torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0]))
    for whole, alone in zip(results[0][:3], run(slice(40, 59))):
        assert torch.equal(whole[40:59], alone)


@pytest.mark.parametrize("bits", [torch.bfloat16, torch.float16])
def test_every_half_is_widened_exactly(isa, bits):
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(bits)
    values = values[values.isfinite() & (values <= 0)]
    logits = torch.stack([torch.zeros_like(values), values], 1)
    out = sample(logits, seed=1, position=0, temperature=0, backend="native")
    exact = -torch.log1p(values.double().exp())
    assert ((out.logprob - exact).abs() <= 2e-7).all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("heads", "head_dim"), [((4, 2), 32), ((3, 3), 7), ((34, 2), 24), ((8, 1), 128)])
def test_attention(isa, dtype, heads, head_dim):
    """Sequences that share 64 tokens, in four slabs of rows at most; then all rows over one sequence."""
    torch.manual_seed(head_dim)
    page_size, lens = 8, torch.tensor([64, 65, 100, 129, 71, 133, 64, 90], dtype=torch.int32)
    caches = torch.randn(2, 200, page_size, heads[1], head_dim).to(dtype)
    table = torch.randperm(200)[: 8 * 17].view(8, 17).int()
    table[:, :8] = table[0, :8]
    query, scale = torch.randn(8, heads[0], head_dim).to(dtype), head_dim**-0.5
    hints = {"prefix_group": torch.zeros(8, dtype=torch.int32), "prefix_lens": torch.tensor([64], dtype=torch.int32)}
    out = paged_attention(query, *caches, table, lens, softmax_scale=scale, backend="native", **hints)
    alone = paged_attention(query, *caches, table, lens, softmax_scale=scale, backend="native")
    assert torch.equal(out, alone)

    def dense(cast, keys, values, queries):
        grouped = queries.to(cast).view(heads[1], -1, head_dim)
        keys, values = (x.to(cast).transpose(0, 1) for x in (keys, values))
        return ((grouped @ keys.mT * scale).softmax(-1) @ values).view(heads[0], head_dim)

    sequences = [caches[:, table[n].long()].flatten(1, 2)[:, : lens[n]] for n in range(8)]
    exact = torch.stack([dense(torch.float64, *kv, q) for kv, q in zip(sequences, query)])
    assert_as_exact_as_torch(out, torch.stack([dense(dtype, *kv, q) for kv, q in zip(sequences, query)]), exact)

    key, value = caches[:, :10].flatten(1, 2)
    group = torch.zeros(8, dtype=torch.int32)
    out = shared_attention(query, key, value, group, torch.tensor([0, 80]), softmax_scale=scale, backend="native")
    exact = torch.stack([dense(torch.float64, key, value, q) for q in query])
    assert_as_exact_as_torch(out, torch.stack([dense(dtype, key, value, q) for q in query]), exact)
