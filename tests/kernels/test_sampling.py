"""The sampler: compiled and reference give the same tokens, and both what the definition says."""

import math

import pytest
import torch
from scipy.stats import chisquare

from llava_cot_kernels.reference import sampling as reference
from llava_cot_kernels.sampling import SampleOutput, sample
from llava_cot_kernels.stage_tags import StageTags

BACKENDS = ("native", "reference")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
both = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def random_case(seed: int, rows: int, vocabulary: int, dtype: torch.dtype) -> tuple[torch.Tensor, dict]:
    """Logits with ties and masked tokens, and parameters that mix every filter, each off for some candidates."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocabulary, generator=g) * 4
    logits = logits.where(torch.rand(rows, vocabulary, generator=g) < 0.7, logits.round())
    logits = logits.masked_fill(torch.rand(rows, vocabulary, generator=g) < 0.2, -torch.inf)
    logits[:, seed % vocabulary] = 1.0

    def sometimes(value: torch.Tensor, off: float) -> torch.Tensor:
        return value.where(torch.rand(rows, generator=g) < 0.6, off)

    parameters = {
        "temperature": sometimes(torch.rand(rows, generator=g) * 2, 1.0),
        "top_k": sometimes(torch.randint(0, 50, (rows,), generator=g), 0),
        "top_p": sometimes(1 - torch.rand(rows, generator=g), 1.0),
        "min_p": sometimes(torch.rand(rows, generator=g) ** 3, 0.0),
        "seed": torch.randint(0, 2**63 - 1, (rows,), generator=g),
        "position": torch.randint(0, 2**63 - 1, (rows,), generator=g),
    }
    return logits.to(dtype), parameters


def draws(logits: list[float] | torch.Tensor, count: int, backend: str, seed: int = 7, **parameters) -> torch.Tensor:
    """How often each token comes in ``count`` draws of one row."""
    logits = torch.as_tensor(logits)[None]
    row = torch.zeros(count, dtype=torch.int64)
    out = sample(logits, row=row, seed=seed, position=torch.arange(count), backend=backend, **parameters)
    return torch.bincount(out.token, minlength=logits.shape[1])


def allowed(logits: list[float], backend: str, **parameters) -> list[int]:
    return draws(logits, 300, backend, **parameters).nonzero().flatten().tolist()


# ---- the two back ends ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [1, 2, 127, 255, 256, 257, 5003])
def test_native_equals_reference(vocabulary, dtype):
    logits, parameters = random_case(vocabulary, 60, vocabulary, dtype)
    native, ref = (sample(logits, **parameters, backend=backend) for backend in BACKENDS)
    assert torch.equal(native.token, ref.token)
    assert not native.status.any() and not ref.status.any()
    for name in ("logprob", "entropy", "sampling_logprob"):
        torch.testing.assert_close(getattr(native, name), getattr(ref, name), rtol=1e-6, atol=4e-6)
    plain = {name: parameters[name] for name in ("seed", "position")}
    native, ref = (sample(logits, **plain, backend=backend) for backend in BACKENDS)
    assert torch.equal(native.token, ref.token)


def test_native_equals_reference_on_a_real_vocabulary():
    logits, parameters = random_case(0, 6, 128256, torch.float32)
    native, ref = (sample(logits, **parameters, backend=backend) for backend in BACKENDS)
    assert torch.equal(native.token, ref.token)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_against_float64(backend, dtype, seed):
    """The raw distribution's scores err at most twice as much as PyTorch's own softmax in float32, plus an ulp."""
    g = torch.Generator().manual_seed(seed)
    logits = (torch.randn(16, 4001, generator=g) * 5).masked_fill(torch.rand(16, 4001, generator=g) < 0.1, -torch.inf)
    logits = logits.to(dtype)
    out = sample(logits, seed=seed, position=torch.arange(16), temperature=0.6, backend=backend)

    def scores(rows: torch.Tensor) -> torch.Tensor:
        logprobs = rows.log_softmax(1)
        entropy = -(logprobs.exp() * logprobs.clamp(min=-1000)).sum(1)
        sampling = (rows / 0.6).log_softmax(1)
        return torch.stack([t.gather(1, out.token[:, None])[:, 0] for t in (logprobs, sampling)] + [entropy]).double()

    exact = scores(logits.double())
    torch_error = (scores(logits.float()) - exact).abs().max()
    error = (torch.stack([out.logprob, out.sampling_logprob, out.entropy]).double() - exact).abs().max()
    assert error <= 2 * torch_error + exact.abs().max() * torch.finfo(torch.float32).eps


# ---- the draw ----


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_known_answers(counter, key, words):
    """Random123's kat_vectors."""
    out = reference.philox4x32([torch.tensor([c]) for c in counter], [torch.tensor([k]) for k in key])
    assert [int(word) for word in out] == words


def test_first_uniform_picks_the_token(backend):
    """Seed 0 and position 0 give the uniform 0xe169c58d6627e8d5 / 2^64 = 0.8805, so bin 88 of 100 equal ones."""
    out = sample(torch.zeros(1, 100), seed=0, position=0, backend=backend)
    assert out.token.item() == 0xE169C58D6627E8D5 * 100 >> 64 == 88


def test_scale_uniform():
    g = torch.Generator().manual_seed(3)
    words = torch.randint(0, 2**32, (2, 100), generator=g)
    words[:, 0], words[:, 1] = 2**32 - 1, 0
    total = torch.randint(1, 2**63 - 1, (100,), generator=g)
    scaled = reference.scale_uniform(words[0], words[1], total)
    assert scaled.tolist() == [(h << 32 | low) * t >> 64 for h, low, t in zip(*words.tolist(), total.tolist())]


def test_exp_nonpositive_within_two_ulp():
    x = torch.cat([-torch.linspace(0, 87, 200_001), torch.tensor([-87.5, -1e30, -torch.inf])])
    e, exact = reference.exp_nonpositive(x), x.double().exp()
    assert e[0] == 1
    assert (e[-3:] == 0).all()
    assert ((e.double() - exact)[:-3].abs() <= 2 * 2.0**-23 * exact[:-3]).all()


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 4},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"temperature": 1.7, "top_k": 6, "top_p": 0.9},
    ],
    ids=str,
)
@both
def test_draws_follow_the_distribution(backend, parameters):
    g = torch.Generator().manual_seed(5)
    logits = torch.randn(11, generator=g)
    logits[3] = -torch.inf
    p = (logits.double() / parameters.get("temperature", 1.0)).softmax(0)
    if k := parameters.get("top_k"):
        p = p * (p >= p.sort(descending=True).values[k - 1])
    if top_p := parameters.get("top_p"):
        p = p / p.sum()
        descending = p.sort(descending=True).values
        p = p * (p >= descending[int((descending.cumsum(0) < top_p).sum())])
    p = p * (p >= parameters.get("min_p", 0.0) * p.max())
    p = p / p.sum()
    count = 40_000
    counts = draws(logits, count, backend, **parameters)
    assert (p > 0).sum() > 2
    assert (counts[p == 0] == 0).all()
    assert chisquare(counts[p > 0].numpy(), (p[p > 0] * count).numpy()).pvalue > 1e-4


@both
def test_seeds_are_independent(backend):
    row = torch.zeros(20_000, dtype=torch.int64)
    out = sample(torch.zeros(1, 16), row=row, seed=torch.arange(20_000), position=3, backend=backend)
    assert chisquare(torch.bincount(out.token, minlength=16).numpy()).pvalue > 1e-4


def test_a_draw_depends_on_its_candidate_alone(backend, threads):
    logits, parameters = random_case(11, 24, 701, torch.float32)
    threads(1)
    alone = [
        sample(logits[n : n + 1], **{k: v[n : n + 1] for k, v in parameters.items()}, backend=backend)
        for n in range(24)
    ]
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    for count in (1, 2):
        threads(count)
        shuffled = sample(logits, row=order, **{k: v[order] for k, v in parameters.items()}, backend=backend)
        for field, whole in shuffled._asdict().items():
            each = torch.cat([getattr(out, field) for out in alone])[order]
            if backend == "native":
                assert torch.equal(whole, each), field
            else:
                torch.testing.assert_close(whole, each, rtol=1e-6, atol=1e-6)


def test_fork_equals_copies_of_the_row(backend):
    """Runs of candidates on one row share work in native code; mixed parameters in a run must not leak."""
    logits, parameters = random_case(12, 40, 300, torch.bfloat16)
    row = torch.tensor([0] * 10 + [1] * 10 + [0] * 5 + [2] * 15)
    for name in ("temperature", "top_k", "top_p", "min_p"):
        parameters[name][10:16] = parameters[name][10]
    parameters["temperature"][:10:2] = 1.0
    fork = sample(logits, row=row, **parameters, backend=backend)
    copies = sample(logits[row], **parameters, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(fork, copies))


# ---- temperature and filters ----


def test_greedy(backend):
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0], [-torch.inf, -5.0, -torch.inf, -5.0]])
    out = sample(logits, temperature=0, top_k=1, top_p=0.1, min_p=1.0, seed=1, position=0, backend=backend)
    assert out.token.tolist() == [1, 1]
    assert out.sampling_logprob.tolist() == [0, 0]
    torch.testing.assert_close(out.logprob, torch.stack([logits[0].log_softmax(0)[1], torch.tensor(math.log(0.5))]))


def test_filters(backend):
    tied = [2.0, 1.0, 1.0, 0.0, 1.0]
    assert allowed(tied, backend, top_k=1) == [0]
    assert allowed(tied, backend, top_k=2) == [0, 1, 2, 4]  # every tie with the second
    assert allowed(tied, backend, top_k=99) == [0, 1, 2, 3, 4]
    masses = torch.tensor([4.0, 2.0, 2.0, 1.0, 1.0]).log().tolist()  # 0.4 0.2 0.2 0.1 0.1
    assert allowed(masses, backend, top_p=0.39) == [0]
    assert allowed(masses, backend, top_p=0.41) == [0, 1, 2]  # both ties
    assert allowed(masses, backend, top_p=0.79) == [0, 1, 2]
    assert allowed(masses, backend, top_p=0.81) == [0, 1, 2, 3, 4]
    assert allowed(masses, backend, top_p=1e-30) == [0]
    assert allowed(masses, backend, top_k=3, top_p=0.49) == [0]  # 0.4 of 0.8 is what top_k left
    assert allowed(masses, backend, top_k=3, top_p=0.51) == [0, 1, 2]
    assert allowed(masses, backend, min_p=1.0) == [0]
    assert allowed(masses, backend, min_p=0.49) == [0, 1, 2]
    assert allowed(masses, backend, min_p=0.26, temperature=2.0) == [0, 1, 2, 3, 4]
    assert allowed([1.0, 1.0], backend, top_p=1e-30, min_p=1.0) == [0, 1]  # tied with the largest
    assert allowed([0.0, -torch.inf, 0.0], backend, top_k=3) == [0, 2]
    assert allowed([0.0, -40.0], backend) == [0]  # less likely by 2^-40


def test_sampling_logprob_is_that_of_the_filtered_distribution(backend):
    logits = torch.tensor([[4.0, 2.0, 2.0, 1.0, 1.0]]).log()
    out = sample(logits, top_k=3, temperature=0.5, seed=3, position=0, backend=backend)
    expected = math.log([16, 4, 4][out.token.item()] / 24)
    assert out.sampling_logprob.item() == pytest.approx(expected, rel=1e-6)


def test_extreme_logits(backend):
    logits = torch.tensor([[3e38, -3e38, 0.0], [1e-30, 0.0, -torch.inf]])
    out = sample(logits, seed=1, position=0, temperature=1e-20, backend=backend)
    assert out.token[0] == 0
    assert out.logprob[0] == out.entropy[0] == 0
    for value in out:
        assert value.isfinite().all()
    assert out.entropy[1] == pytest.approx(math.log(2), rel=1e-6)


# ---- rows, slots, tags, layouts ----


def test_idle_slots(backend):
    tags = StageTags([b"</A>", b""], ["</A>"])
    state = torch.tensor([1, 0, 3], dtype=torch.int32)
    row = torch.tensor([-1, 0, -1])
    out = sample(torch.zeros(1, 1), row=row, seed=1, position=0, tags=tags, tag_state=state, backend=backend)
    assert out.token.tolist() == [-1, 0, -1]
    for field in (out.logprob, out.entropy, out.sampling_logprob, out.overhang, out.status):
        assert field.tolist() == [0, 0, 0]
    assert out.tag.tolist() == [-1, 0, -1]
    assert out.tag_state[::2].tolist() == [1, 3]
    assert state.tolist() == [1, 0, 3]


def test_no_candidates(backend):
    none = torch.empty(0, dtype=torch.int64)
    for out in (
        sample(torch.empty(0, 5), seed=1, position=0, backend=backend),
        sample(torch.zeros(2, 5), row=none, seed=none, position=none, backend=backend),
    ):
        assert all(field.shape == (0,) for field in out)
    idle = sample(torch.empty(0, 5), row=torch.tensor([-1]), seed=1, position=0, backend=backend)
    assert idle.token.tolist() == [-1]


def test_types_and_no_tags(backend):
    out = sample(torch.zeros(3, 7, dtype=torch.float16), seed=1, position=2, backend=backend)
    assert isinstance(out, SampleOutput)
    dtypes = [field.dtype for field in out]
    assert dtypes == [torch.int64, *[torch.float32] * 3, *[torch.int32] * 4]
    assert out.tag_state.tolist() == [0, 0, 0]
    assert out.tag.tolist() == [-1, -1, -1]
    assert out.overhang.tolist() == [0, 0, 0]


def test_tags_shorter_than_the_vocabulary(backend):
    tags = StageTags([b"<"], ["<A>"])
    out = sample(torch.tensor([[-torch.inf, 0.0]]), seed=1, position=0, tags=tags, tag_state=2, backend=backend)
    assert (out.token.item(), out.tag_state.item(), out.tag.item()) == (1, 2, -1)


def test_layouts(backend):
    logits, parameters = random_case(21, 9, 133, torch.bfloat16)
    expected = sample(logits, **parameters, backend=backend)
    wide = torch.full((9, 150), torch.nan, dtype=torch.bfloat16)
    wide[:, 5:138] = logits
    strided = {name: value.repeat_interleave(3)[::3] for name, value in parameters.items()}
    for view in (wide[:, 5:138], logits.t().contiguous().t()):
        before = view.clone()
        out = sample(view, **strided, backend=backend)
        assert all(torch.equal(a, b) for a, b in zip(out, expected))
        assert torch.equal(view, before)
    assert wide.isnan().sum() == 9 * 17


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, None])
def test_bad_rows(backend, poison):
    logits = torch.zeros(4, 3)
    logits[2] = -torch.inf
    if poison is not None:
        logits[2, 1] = poison
    row = torch.tensor([0, 3, 2])
    with pytest.raises(ValueError, match="logits row 2 must have a finite largest value and no NaN, for candidate 2"):
        sample(logits, row=row, seed=1, position=0, backend=backend)
    sample(logits, row=row[:2], seed=1, position=0, backend=backend)
