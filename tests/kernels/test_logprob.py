"""token_logprobs and linear_logprobs against a float64 reference; errors are measured against plain PyTorch's own."""

import subprocess
import sys

import pytest
import torch
from helpers.logprob import DTYPES, assert_as_exact_as_torch, draw, linear, plain_linear_logprobs, run

from llava_cot_kernels import logprob
from llava_cot_kernels.logprob import linear_logprobs, token_logprobs
from llava_cot_kernels.reference import logprob as reference

LINEAR_BACKENDS = ("native", "triton", "reference")
OPS = torch.ops.llava_cot_kernels


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def threads():
    """Set the number of threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# ---- token_logprobs ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T, V", [(1, 1), (1, 4095), (3, 4096), (7, 4097), (129, 61), (2, 128256), (0, 5), (5, 12289)])
def test_token_logprobs_matches_float64(generator, backend, dtype, T, V):
    logits = (torch.randn(T, V, generator=generator) * 5).to(dtype)
    targets = torch.randint(V, (T,), generator=generator)
    exact = reference.token_logprobs(logits.double(), targets)
    plain = torch.log_softmax(logits.float(), -1).gather(1, targets[:, None]).squeeze(1)
    assert_as_exact_as_torch(token_logprobs(logits, targets, backend=backend), plain, exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_token_logprobs_of_every_half_value(dtype):
    """Subnormals, extremes and both zeros are widened as PyTorch does it."""
    if dtype == torch.float32:
        logits = torch.tensor([[-3.4e38, 3.4e38, 0.0, -0.0, 1e-45, 1.0]])
    else:
        bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
        values = bits.view(dtype)
        logits = torch.stack([torch.zeros_like(values), values], 1)[values.isfinite()]
    targets = torch.ones(len(logits), dtype=torch.int64)
    expected = reference.token_logprobs(logits, targets)
    torch.testing.assert_close(token_logprobs(logits, targets, backend="native"), expected, rtol=1e-6, atol=2e-7)


@pytest.mark.parametrize("V", [5, 9001])
def test_masked_tokens_nan_and_ignored_rows(backend, V):
    logits = torch.randn(7, V)
    targets = torch.zeros(7, dtype=torch.int64)
    logits[0, 1:] = -torch.inf  # one token left: certain
    logits[1, 0] = -torch.inf  # the target is masked
    logits[2, V - 1] = torch.nan
    logits[3] = torch.nan
    logits[4] = -torch.inf
    logits[5, 1] = torch.inf
    targets[3] = -100
    out = token_logprobs(logits, targets, backend=backend)
    assert out[0] == 0
    assert out[1] == -torch.inf
    assert out[3] == 0
    assert out[[2, 4, 5]].isnan().all()
    masked_half = torch.randn(1, V).masked_fill(torch.arange(V) >= V // 2, -torch.inf)
    torch.testing.assert_close(
        token_logprobs(masked_half, torch.tensor([1]), backend=backend),
        token_logprobs(masked_half[:, : V // 2], torch.tensor([1]), backend=backend),
    )


def test_token_logprobs_reads_views_in_place(generator):
    base = torch.randn(6, 4, 5003, generator=generator)
    targets = torch.randint(5003, (6,), generator=generator)
    strided, transposed = base[:, 1], base[0].T[:6]
    for view, tokens in ((strided, targets), (transposed, targets % 4)):
        assert not view.is_contiguous()
        expected = token_logprobs(view.contiguous(), tokens, backend="native")
        assert torch.equal(token_logprobs(view, tokens, backend="native"), expected)
    every_other = torch.stack([targets, targets], 1)[:, 0]
    assert torch.equal(token_logprobs(strided, every_other), token_logprobs(strided, targets))


def test_results_do_not_depend_on_the_thread_count(generator, threads):
    logits = torch.randn(3, 50_021, generator=generator)
    targets = torch.randint(50_021, (3,), generator=generator)
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(token_logprobs(logits, targets, backend="native"))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_token_logprobs_gradient(generator, dtype):
    logits = torch.randn(9, 301, generator=generator).to(dtype)
    targets = torch.randint(301, (9,), generator=generator)
    targets[4] = -100
    logits[4] = torch.nan
    grad = torch.randn(9, generator=generator)

    def gradient(function, source):
        source = source.detach().requires_grad_()
        return torch.autograd.grad(function(source, targets), source, grad.to(source.dtype).to(function_dtype(source)))[
            0
        ]

    def function_dtype(source):
        return torch.float64 if source.dtype == torch.float64 else torch.float32

    exact = gradient(reference.token_logprobs, logits.double())
    plain = gradient(reference.token_logprobs, logits)
    assert_as_exact_as_torch(gradient(token_logprobs, logits), plain, exact)
    assert (gradient(token_logprobs, logits)[4] == 0).all()


# ---- linear_logprobs ----

# One tile; several row tiles (V big); several vocabulary tiles (H big); both, with odd remainders; edges.
NATIVE_SHAPES = [(5, 37, 16), (1, 1, 1), (131, 32771, 63), (13, 301, 16411), (0, 7, 8), (4, 11, 0), (700, 4099, 521)]
NATIVE_SHAPES += [
    (97, 4099, 134),
    (17, 997, 34),
    (1, 49, 66),
]  # even H: pairs of bfloat16, panels, last rows and tokens
# Few rows and many; tiles that are full, or one short of or over it.
TRITON_SHAPES = [(5, 37, 16), (1, 1, 1), (0, 7, 8), (4, 11, 0), (16, 64, 128), (17, 257, 63), (129, 255, 65)]
SHAPES = [("native", *shape) for shape in NATIVE_SHAPES] + [("triton", *shape) for shape in TRITON_SHAPES]


@pytest.mark.covering(1, backend="triton")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend, T, V, H", SHAPES)
def test_linear_logprobs_and_gradients_match_float64(generator, backend, T, V, H, dtype):
    hidden, weight, targets = draw(generator, T, V, H, dtype)
    grads = torch.randn(2, T, generator=generator)
    exact = run(reference.linear_logprobs, hidden.double(), weight.double(), targets, 0.7, grads)
    plain = run(reference.linear_logprobs, hidden, weight, targets, 0.7, grads)
    if backend == "triton" or dtype == torch.bfloat16:  # the logits' gradient is rounded to the inputs' dtype
        plain = plain[:2] + run(plain_linear_logprobs, hidden, weight, targets, 0.7, grads)[2:]
    actual = run(linear(backend), hidden, weight, targets, 0.7, grads)
    for ours, theirs, truth in zip(actual, plain, exact):
        assert_as_exact_as_torch(ours, theirs, truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", LINEAR_BACKENDS)
def test_ignored_rows_give_zero_and_no_gradient(generator, backend, dtype):
    hidden, weight, targets = draw(generator, 9, 23, 8, dtype)
    targets[:] = torch.tensor([3, -100, 5, -100, -100, 0, 22, 1, -100])
    ignored = targets == -100
    hidden[ignored] = torch.nan  # never multiplied
    hidden.requires_grad_(), weight.requires_grad_()
    logprobs, entropy = linear(backend)(hidden, weight, targets, entropy=True)
    (logprobs.sum() + entropy.sum()).backward()
    for values in (logprobs, entropy, hidden.grad):
        assert (values[ignored] == 0).all()
        assert values.isfinite().all()
    assert weight.grad.isfinite().all()
    kept = hidden.detach()[~ignored]
    assert torch.equal(logprobs[~ignored], linear(backend)(kept, weight, targets[~ignored]))


@pytest.mark.parametrize("backend", LINEAR_BACKENDS)
def test_all_rows_ignored(generator, backend):
    hidden, weight, _ = draw(generator, 4, 23, 8, torch.bfloat16)
    hidden.requires_grad_(), weight.requires_grad_()
    logprobs = linear(backend)(hidden, weight, torch.full((4,), -100))
    logprobs.sum().backward()
    assert logprobs.eq(0).all() and hidden.grad.eq(0).all() and weight.grad.eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", LINEAR_BACKENDS)
def test_extreme_logits(backend, dtype):
    """A token 200 nats below the others, an all but certain one, and a NaN."""
    hidden = torch.tensor([[1.0, 0.0], [0.0, 90.0], [torch.nan, 1.0]], dtype=dtype)
    weight = torch.tensor([[-200.0, 0.0], [0.0, 5.0], [0.0, -3.0]], dtype=dtype)
    logprobs, entropy = linear(backend)(hidden, weight, torch.tensor([0, 1, 1]), entropy=True)
    log2 = torch.tensor(2.0).log()
    torch.testing.assert_close(logprobs[:2], torch.stack([-200 - log2, torch.tensor(0.0)]))
    torch.testing.assert_close(entropy[:2], torch.stack([log2, torch.tensor(0.0)]))
    assert logprobs[2].isnan() and entropy[2].isnan()


@pytest.mark.parametrize("backend", LINEAR_BACKENDS)
def test_masked_token_through_the_weight(backend):
    """Logits of -inf: log-prob -inf, entropy and gradient of the others finite."""
    hidden = torch.ones(1, 1, requires_grad=True)
    weight = torch.tensor([[-torch.inf], [1.0], [2.0]])
    logprobs, entropy = linear(backend)(hidden.expand(2, 1), weight, torch.tensor([0, 1]), entropy=True)
    two = torch.log_softmax(torch.tensor([1.0, 2.0]), 0)
    assert logprobs[0] == -torch.inf
    torch.testing.assert_close(logprobs[1], two[0])
    torch.testing.assert_close(entropy, -(two.exp() * two).sum().expand(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["native", "triton"])
def test_only_the_gradient_that_is_needed(generator, backend, dtype):
    hidden, weight, targets = draw(generator, 31, 97, 24, dtype)
    both = run(linear(backend), hidden, weight, targets, 1.0, torch.ones(2, 31))
    for index, tensor in enumerate((hidden, weight)):
        tensor.requires_grad_()
        outputs = linear(backend)(hidden, weight, targets, entropy=True)
        (gradient,) = torch.autograd.grad(sum(out.sum() for out in outputs), tensor)
        assert torch.equal(gradient, both[2 + index])
        tensor.requires_grad_(False)
    assert not linear(backend)(hidden, weight, targets).requires_grad


def test_two_runs_give_the_same_bits(generator, threads):
    hidden, weight, targets = draw(generator, 300, 3001, 1031, torch.bfloat16)
    grads = torch.randn(2, 300, generator=generator)
    threads(2)
    first = run(linear_logprobs, hidden, weight, targets, 1.3, grads)
    second = run(linear_logprobs, hidden, weight, targets, 1.3, grads)
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_two_threads_agree_with_one(generator, threads):
    hidden, weight, targets = draw(generator, 300, 3001, 131, torch.float32)
    grads = torch.randn(2, 300, generator=generator)
    results = []
    for count in (1, 2):
        threads(count)
        results.append(run(linear_logprobs, hidden, weight, targets, 1.0, grads))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["native", "triton"])
def test_linear_logprobs_reads_views(generator, backend, dtype):
    hidden, weight, targets = draw(generator, 12, 41, 10, dtype)
    grads = torch.ones(2, 12)
    expected = run(linear(backend), hidden, weight, targets, 1.0, grads)
    wide = torch.full((12, 2, 10), torch.nan, dtype=dtype)
    wide[:, 1] = hidden
    padded = torch.full((41, 13), torch.nan, dtype=dtype)
    padded[:, 2:12] = weight
    for h, w in ((wide[:, 1], padded[:, 2:12]), (hidden.T.contiguous().T, weight.T.contiguous().T)):
        torch.testing.assert_close(run(linear(backend), h, w, targets, 1.0, grads), expected)


def test_logits_are_never_all_in_memory():
    """Forward and backward of [T, V] = 512 MiB of float32 logits raise the peak by less than a fifth of it."""
    script = """if True:
        import resource, torch
        from llava_cot_kernels.logprob import linear_logprobs
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        hidden, weight = torch.randn(2048, 8, requires_grad=True), torch.randn(65536, 8, requires_grad=True)
        def step(n):
            linear_logprobs(hidden[:n], weight, torch.arange(n), backend="native").sum().backward()
        torch.set_num_threads(2)  # each has a tile, whatever the machine
        step(1)
        before = peak()
        step(2048)
        print(peak() - before)
    """
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert float(result.stdout) < 100, f"peak memory grew by {result.stdout} MiB"


# Logits of 64 tokens' width; several vocabulary tiles (H big), also with several row tiles; odd sizes of 16-bit memory.
STORED_SHAPES = [(16, 301, 64), (13, 301, 16411), (290, 997, 16411), (41, 4099, 134), (9, 1, 35), (31, 2999, 67)]


@pytest.mark.parametrize("place", ["own memory", "the gradient of the weight"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T, V, H", STORED_SHAPES)
def test_stored_logits_give_the_gradients_that_recomputed_ones_give(generator, monkeypatch, T, V, H, dtype, place):
    """The first backward finds the forward's logits. A second one through the same graph computes them again."""
    is_separate = place == "own memory"
    monkeypatch.setattr(logprob, "STORED_LOGITS", 2**40 if is_separate else 0)
    hidden, weight, targets = draw(generator, T, V, H, dtype)
    hidden.requires_grad_(), weight.requires_grad_()
    outputs = linear_logprobs(hidden, weight, targets, temperature=0.7, entropy=True, backend="native")
    logits = outputs[0].grad_fn.logits
    assert logits.shape == ((V * -(-T // 16) * 16,) if is_separate else weight.shape)
    grads = torch.randn(2, T, generator=generator)
    stored = torch.autograd.grad(outputs, (hidden, weight), grads.unbind(), retain_graph=True)
    assert outputs[0].grad_fn.logits is None and (is_separate or stored[1].data_ptr() == logits.data_ptr())
    recomputed = torch.autograd.grad(outputs, (hidden, weight), grads.unbind())
    for ours, theirs in zip(stored, recomputed):
        torch.testing.assert_close(ours, theirs)


def test_logits_are_stored_only_for_a_backward_and_where_they_fit(generator, monkeypatch):
    monkeypatch.setattr(logprob, "STORED_LOGITS", 0)
    hidden, weight, targets = draw(generator, 16, 7, 16, torch.float32, ignored=0)

    def logits(rows, needs_hidden=True, needs_weight=True):
        inputs = hidden[:rows].clone().requires_grad_(needs_hidden), weight.clone().requires_grad_(needs_weight)
        return linear_logprobs(*inputs, targets[:rows], backend="native").grad_fn.logits

    assert logits(16) is not None and logits(16, needs_hidden=False) is not None
    assert logits(16, needs_weight=False) is None  # there will be no gradient to leave them in
    hidden, targets = hidden.repeat(2, 1), targets.repeat(2)
    assert logits(17) is None  # a token has 32 logits with the padding, and 16 numbers of the gradient
    with torch.no_grad():
        outputs = linear_logprobs(hidden.requires_grad_(), weight.requires_grad_(), targets, backend="native")
    assert outputs.grad_fn is None


def test_stored_logits_do_not_raise_the_peak():
    """64 MiB of logits in a gradient of 128 MiB: forward and backward need little more than the gradient."""
    script = """if True:
        import resource, torch
        from llava_cot_kernels.logprob import linear_logprobs
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        hidden, weight = torch.randn(256, 512, requires_grad=True), torch.randn(65536, 512, requires_grad=True)
        def step(n, vocab_size):
            out = linear_logprobs(hidden[:n], weight[:vocab_size], torch.arange(n), backend="native")
            return torch.autograd.grad(out.sum(), (hidden, weight) if vocab_size == 65536 else hidden)
        torch.set_num_threads(2)
        step(1, 64)
        before = peak()
        step(256, 65536)
        print(peak() - before)
    """
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert float(result.stdout) < 128 + 48, f"peak memory grew by {result.stdout} MiB"


def test_gradcheck_of_the_reference(generator):
    hidden, weight, targets = draw(generator, 5, 7, 3, torch.float64)
    targets[2] = -100
    inputs = (hidden.requires_grad_(), weight.requires_grad_())
    assert torch.autograd.gradcheck(
        lambda h, w: reference.linear_logprobs(h, w, targets, temperature=0.6, entropy=True), inputs
    )
    assert torch.autograd.gradcheck(lambda h: reference.token_logprobs(h @ weight.detach().T, targets), inputs[:1])


def test_autocast_does_not_round_the_tiles(generator):
    hidden, weight, targets = draw(generator, 8, 50, 16, torch.float32)
    expected = linear_logprobs(hidden, weight, targets, backend="native")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear_logprobs(hidden, weight, targets, backend="native"), expected)


@pytest.mark.parametrize(
    "backend, compiler, stored_logits",
    [
        ("native", "inductor", 2**20),
        ("native", "aot_eager", 2**20),
        ("native", "aot_eager", 0),
        ("triton", "aot_eager", 0),
    ],
)
def test_a_compiled_training_step_is_one_graph_and_equals_eager(
    generator, monkeypatch, backend, compiler, stored_logits
):
    monkeypatch.setattr(logprob, "STORED_LOGITS", stored_logits)
    hidden, weight, targets = draw(generator, 8, 50, 16, torch.float32)

    def loss(hidden, weight):
        logprobs, entropy = linear(backend)(torch.tanh(hidden), weight, targets, temperature=0.8, entropy=True)
        return -(logprobs + 0.1 * entropy).sum() / (targets != -100).sum()

    def step(function):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        value = function(*leaves)
        value.backward()
        return value.detach(), *(leaf.grad for leaf in leaves)

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend=compiler)  # fullgraph: a graph break is an error
    torch.testing.assert_close(step(compiled), step(loss))


def test_compiled_token_logprobs_is_one_graph_and_equals_eager(generator):
    hidden, weight, targets = draw(generator, 8, 50, 16, torch.float32)
    logits = (hidden @ weight.T).requires_grad_()
    torch._dynamo.reset()
    compiled = torch.compile(token_logprobs, fullgraph=True, backend="aot_eager")
    expected, actual = token_logprobs(logits, targets), compiled(logits, targets)
    assert torch.equal(actual, expected)
    gradients = [torch.autograd.grad(out.sum(), logits)[0] for out in (actual, expected)]
    assert torch.equal(*gradients)


# ---- the raw ops ----


def poisoned(*shape, dtype=torch.float32):
    return torch.full(shape, torch.nan, dtype=dtype)


def test_outputs_are_written_whole_and_inputs_not_at_all(generator):
    hidden, weight, targets = draw(generator, 12, 41, 10, torch.bfloat16)
    targets[0] = -100
    logits = (hidden @ weight.T).contiguous()
    inputs = [tensor.clone() for tensor in (hidden, weight, targets, logits)]
    out = poisoned(12)
    OPS.token_logprobs(logits, targets, out)
    assert out.isfinite().all()
    logprobs, lse, entropy = (poisoned(12) for _ in range(3))
    OPS.linear_logprobs(hidden, weight, targets, 1.0, logprobs, lse, entropy)
    grad_hidden, grad_weight = poisoned(12, 10, dtype=hidden.dtype), poisoned(41, 10, dtype=hidden.dtype)
    ones = torch.ones(12)
    OPS.linear_logprobs_backward(ones, ones, hidden, weight, targets, lse, entropy, 1.0, grad_hidden, grad_weight)
    for written in (logprobs, lse, entropy, grad_hidden, grad_weight):
        assert written.isfinite().all()
    assert all(torch.equal(a, b) for a, b in zip(inputs, (hidden, weight, targets, logits)))


@pytest.mark.parametrize("needs_weight", [True, False])
def test_opcheck(generator, needs_weight):
    hidden, weight, targets = draw(generator, 6, 41, 10, torch.float32)
    torch.library.opcheck(OPS.token_logprobs.default, (hidden @ weight.T, targets, torch.empty(6)))
    logprobs, lse, entropy = (torch.zeros(6) for _ in range(3))
    torch.library.opcheck(OPS.linear_logprobs.default, (hidden, weight, targets, 1.0, logprobs, lse, entropy))
    logits = torch.empty(41, 16)
    torch.library.opcheck(OPS.linear_logprobs.default, (hidden, weight, targets, 1.0, logprobs, lse, entropy, logits))
    OPS.linear_logprobs(hidden, weight, targets, 1.0, logprobs, lse, entropy)
    grad_weight = torch.empty_like(weight) if needs_weight else None
    torch.library.opcheck(
        OPS.linear_logprobs_backward.default,
        (
            torch.ones(6),
            torch.ones(6),
            hidden,
            weight,
            targets,
            lse,
            entropy,
            1.0,
            torch.empty_like(hidden),
            grad_weight,
        ),
    )


def test_raw_ops_check_what_memory_safety_needs():
    logits, targets = torch.randn(3, 5), torch.tensor([0, 5, 1])
    with pytest.raises(RuntimeError, match=r"targets must be -100 or in \[0, 5\), got 5 at 1"):
        OPS.token_logprobs(logits, targets, torch.empty(3))
    with pytest.raises(RuntimeError, match=r"logprobs must have shape \[T=3\]"):
        OPS.token_logprobs(logits, targets % 5, torch.empty(2))
    outputs = [torch.empty(3) for _ in range(3)]
    with pytest.raises(RuntimeError, match="weight must have size 4 in dimension 1, got 3"):
        OPS.linear_logprobs(torch.ones(3, 4), torch.ones(5, 3), targets % 5, 1.0, *outputs)
    with pytest.raises(RuntimeError, match="logits must have 320 bytes, got 316"):
        OPS.linear_logprobs(torch.ones(3, 4), torch.ones(5, 4), targets % 5, 1.0, *outputs, torch.empty(79))


# ---- what the public functions say of bad input ----


def test_bad_input_of_token_logprobs():
    logits, targets = torch.randn(3, 5), torch.tensor([0, 4, -100])
    with pytest.raises(ValueError, match=r"targets must be -100 or in \[0, V=5\), got 5 at 1"):
        token_logprobs(logits, torch.tensor([0, 5, 1]))
    with pytest.raises(ValueError, match=r"targets must be -100 or in \[0, V=5\), got -1 at 2"):
        token_logprobs(logits, torch.tensor([0, 4, -1]))
    with pytest.raises(ValueError, match=r"targets must have T=3 in dimension 0, got 2"):
        token_logprobs(logits, targets[:2])
    with pytest.raises(TypeError, match="targets must be int64, got int32"):
        token_logprobs(logits, targets.int())
    with pytest.raises(TypeError, match="logits must be float32 or bfloat16 or float16, got float64"):
        token_logprobs(logits.double(), targets)
    with pytest.raises(ValueError, match=r"logits must have shape \[T, V\], got \[5\]"):
        token_logprobs(logits[0], targets)
    with pytest.raises(ValueError, match=r"backend of token_logprobs on cpu must be one of .*, got 'triton'"):
        token_logprobs(logits, targets, backend="triton")


def test_bad_input_of_linear_logprobs():
    hidden, weight, targets = torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 4, -100])
    with pytest.raises(ValueError, match="weight must have H=4 in dimension 1, got 3"):
        linear_logprobs(hidden, weight[:, :3], targets)
    with pytest.raises(TypeError, match="weight must be float32, got bfloat16"):
        linear_logprobs(hidden, weight.bfloat16(), targets)
    with pytest.raises(ValueError, match=r"targets must be -100 or in \[0, V=5\), got 7 at 0"):
        linear_logprobs(hidden, weight, targets + 7)
    for temperature in (0.0, -1.0):
        with pytest.raises(ValueError, match="temperature must be > 0, got"):
            linear_logprobs(hidden, weight, targets, temperature=temperature)
    for temperature in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="temperature must be finite in float32, got"):
            linear_logprobs(hidden, weight, targets, temperature=temperature)
    with pytest.raises(TypeError, match="temperature must be a number, got str"):
        linear_logprobs(hidden, weight, targets, temperature="1")
    with pytest.raises(TypeError, match=r"hidden must be a tensor \[T, H\], got list"):
        linear_logprobs([1.0], weight, targets)
    assert logprob.IGNORE_INDEX == -100
