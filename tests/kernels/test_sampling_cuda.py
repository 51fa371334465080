"""The CUDA sampler's own choices: teams, shared memory, histograms, alignment. test_sampling.py has what all share.

Its sources run on fibers, and on the GPU where there is one.
"""

import pytest
import torch
from helpers import fibers
from helpers.on_cuda import OnCuda
from test_sampling import DTYPES, random_case
from test_sampling_op import op_arguments

from llava_cot_kernels.backend import OPS
from llava_cot_kernels.sampling import SampleOutput, sample
from llava_cot_kernels.stage_tags import StageTags

FILTERS = [{}, {"top_p": 0.9}, {"top_k": 40}, {"top_k": 3000, "top_p": 0.7, "min_p": 1e-3}, {"temperature": 0.0}]


@pytest.fixture(autouse=True, params=["fibers"] + ["cuda"] * torch.cuda.is_available())
def backend(request, monkeypatch):
    monkeypatch.setitem(OPS, "native", fibers.ops() if request.param == "fibers" else OnCuda())
    return request.param


on_fibers = pytest.mark.parametrize("backend", ["fibers"], indirect=True)  # what only they can change or count


def native(logits: torch.Tensor, **parameters) -> SampleOutput:
    return sample(logits, **parameters, backend="native")


def assert_equals_reference(logits: torch.Tensor, **parameters) -> None:
    out, expected = native(logits, **parameters), sample(logits, **parameters, backend="reference")
    assert torch.equal(out.token, expected.token)
    for name in ("logprob", "entropy", "sampling_logprob"):
        torch.testing.assert_close(getattr(out, name), getattr(expected, name), rtol=1e-6, atol=4e-6)
    for name in ("tag_state", "tag", "overhang", "status"):
        assert torch.equal(getattr(out, name), getattr(expected, name))


def assert_same_bits(out: SampleOutput, expected: SampleOutput) -> None:
    for name, value in out._asdict().items():
        assert torch.equal(value, getattr(expected, name)), name


def mixed_case(seed: int, rows: int, vocabulary: int, dtype: torch.dtype) -> tuple[torch.Tensor, dict]:
    """random_case with greedy candidates and large top_k too."""
    logits, parameters = random_case(seed, rows, vocabulary, dtype)
    parameters["temperature"][::5] = 0
    parameters["top_k"][1::7] = vocabulary // 2
    return logits, parameters


# ---- against the reference ----


@pytest.mark.parametrize(
    ("rows", "vocabulary", "dtype"),
    [
        (3, 1, torch.float16),
        (16, 2, torch.bfloat16),
        (2000, 31, torch.float32),
        (256, 257, torch.bfloat16),
        (256, 1000, torch.float32),
        (16, 1024, torch.float16),
        *((40, 5003, dtype) for dtype in DTYPES),
        (5, 36867, torch.bfloat16),  # two blocks and a last one of three tokens
        *((3, 128256, dtype) for dtype in DTYPES),
        (1, 262144, torch.float32),
        (2, 262144, torch.bfloat16),
    ],
)
def test_equals_reference(rows, vocabulary, dtype):
    logits, parameters = mixed_case(rows + vocabulary, rows, vocabulary, dtype)
    assert_equals_reference(logits, **parameters)


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_rows_of_ties(filters):
    """Flat, two-valued, peaked, within 1/32 of the largest, far below it, and masked but for one token."""
    g = torch.Generator().manual_seed(1)
    noise = torch.rand(9000, generator=g)
    rows = [
        torch.full((9000,), 2.5),
        (noise < 0.3).float() * -1.7,
        torch.where(torch.arange(9000) == 8999, 30.0, noise),
        noise * 0.03,
        noise * 1e-6,
        torch.where(torch.arange(9000) == 17, 0.0, noise * 1e4 - 1e5),
        torch.where(torch.arange(9000) == 4100, -3.0, -torch.inf),
    ]
    logits = torch.stack(rows)
    row = torch.arange(len(rows)).repeat(6)
    seed = torch.arange(len(row))
    for temperature in (0.6, 1.0) if "temperature" not in filters else (0.0,):
        parameters = {**filters, "temperature": temperature}
        assert_equals_reference(logits, row=row, seed=seed, position=3, **parameters)


@pytest.mark.parametrize("top_p", [1e-30, 1e-6, 0.5, 1 - 2**-24])
def test_extreme_filters(top_p):
    logits, parameters = mixed_case(5, 12, 4099, torch.float32)
    assert_equals_reference(logits, **{**parameters, "top_p": top_p})
    assert_equals_reference(logits, **{**parameters, "top_k": torch.arange(12) * 372 + 1})


def test_forks_and_idle_slots():
    logits, parameters = mixed_case(8, 16, 5003, torch.bfloat16)
    row = torch.tensor([2, 2, 2, -1, 0, 2, -1, 15, 15, -1, 7, 7, 7, 7, 7, -1])
    assert_equals_reference(logits, row=row, **parameters)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_at_any_address(dtype):
    """Rows that no wide load may read, and rows that begin aligned and end unaligned."""
    logits, parameters = mixed_case(9, 8, 5003, dtype)
    expected = native(logits, **parameters)
    for offset, stride in [(0, 5004), (0, 5008), (1, 5008), (4, 5017), (7, 5025)]:
        wide = torch.full((8, stride + 8), torch.nan, dtype=dtype)
        view = wide.view(-1)[: 8 * stride].view(8, stride)[:, :5003] if offset == 0 else wide[:, offset : offset + 5003]
        view.copy_(logits)
        assert_same_bits(native(view, **parameters), expected)


# ---- what must not change the result ----


@on_fibers
@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_team_size_and_shared_memory_do_not_show(filters):
    logits, parameters = mixed_case(10, 4, 36867, torch.float32)
    parameters = {"temperature": 0.8, "seed": parameters["seed"], "position": 11, **filters}
    expected = native(logits, **parameters)
    for max_team_size in (1, 2, 4, 8):
        with fibers.limits(num_multiprocessors=10**6, max_team_size=max_team_size):
            assert_same_bits(native(logits, **parameters), expected)
    for max_team_size in (1, 8):  # most of the row is read again in every step
        with fibers.limits(max_team_size=max_team_size, max_shared_bytes=48 * 1024):
            assert_same_bits(native(logits, **parameters), expected)


@on_fibers
@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_order_of_threads_does_not_show(filters):
    logits, parameters = mixed_case(12, 3, 18000, torch.bfloat16)
    parameters = {"temperature": 0.7, "seed": parameters["seed"], "position": 2, **filters}
    with fibers.limits(num_multiprocessors=10**6):
        expected = native(logits, **parameters)
        for seed in (1, 2, 3):
            with fibers.order(seed):
                assert_same_bits(native(logits, **parameters), expected)


# ---- what it costs ----


@on_fibers
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_launch_and_one_read(dtype):
    logits = (torch.randn(2, 128256, generator=torch.Generator().manual_seed(0)) * 4).to(dtype)
    for filters in ({}, {"top_p": 0.9}, {"top_k": 50}, {"top_k": 50, "top_p": 0.9, "min_p": 0.01}, {"temperature": 0}):
        with fibers.counting() as counted:
            native(logits, seed=1, position=torch.arange(2), **{"temperature": 0.6, **filters})
        assert counted.launches == 1
        assert logits.nbytes <= counted.bytes_read <= 1.03 * logits.nbytes  # and the parameters, once a warp
        assert counted.bytes_written <= 100


# ---- what leaves no definition behind ----


def run_op(logits: torch.Tensor, row: list[int], tags: StageTags | None = None, **parameters) -> SampleOutput:
    """The op, which raises for no value; its outputs were full of garbage."""
    names = ("row", "temperature", "top_k", "top_p", "min_p")
    arguments = op_arguments(logits, row, tags)
    for name, value in parameters.items():
        arguments[1 + names.index(name)].fill_(value)
    OPS["native"].sample(*arguments)
    return SampleOutput(*arguments[12:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("poison", [torch.nan, -torch.nan, torch.inf])
def test_bad_rows(poison, dtype):
    logits = torch.randn(6, 9001, generator=torch.Generator().manual_seed(2)).to(dtype)
    expected = run_op(logits, [0, 1, 2, 3, 4, 5])
    for row, place in [(1, 0), (2, 4500), (4, 9000)]:
        logits[row, place] = poison
    logits[5] = -torch.inf
    out = run_op(logits, [0, 1, 2, 3, 4, 5])
    assert out.status.tolist() == [0, 1, 1, 0, 1, 1]
    for name, value in out._asdict().items():
        assert torch.equal(value[[0, 3]], getattr(expected, name)[[0, 3]])
        assert value[1] == (-1 if name in ("token", "tag") else name == "status")


def test_rows_outside_the_logits():
    logits = torch.randn(2, 100)
    out = run_op(logits, [1, 2, -1, 2**40, -(2**40), 0])
    assert out.status.tolist() == [0, 1, 0, 1, 0, 0]
    assert (out.token >= 0).tolist() == [True, False, False, False, False, True]
    assert run_op(torch.empty(0, 7), [-1, 0]).token.tolist() == [-1, -1]


@pytest.mark.parametrize(
    "parameters",
    [
        *({"temperature": value} for value in (torch.nan, -1.0, torch.inf, 1e-45)),
        *({"top_k": value} for value in (-5, 2**62)),
        *({"top_p": value} for value in (0.0, -3.0, torch.nan, torch.inf)),
        *({"min_p": value} for value in (-1.0, 2.0, torch.nan)),
    ],
    ids=str,
)
def test_parameters_that_the_wrapper_refuses_leave_no_memory(parameters):
    logits, _ = random_case(3, 3, 9001, torch.float32)
    token = run_op(logits, [0, 1, 2], **parameters).token
    assert ((token >= 0) & (token < 9001)).all()


# ---- tags ----


def test_tags_equal_the_automaton():
    g = torch.Generator().manual_seed(4)
    pieces = [b"", b"<", b"</", b"A>", b"</A>x", b"x</B", b">", b"B>", b"/", b"A></B>yz", b"\xff\x00"]
    tags = StageTags(pieces, ["</A>", "</B>", "B"])
    state = torch.randint(0, tags.num_states, (200,), generator=g, dtype=torch.int32)
    row = torch.randint(-1, 3, (200,), generator=g)
    logits = torch.randn(3, len(pieces) + 2, generator=g)  # two tokens that the automaton does not know
    out = native(logits, row=row, temperature=3.0, seed=torch.arange(200), position=0, tags=tags, tag_state=state)
    for n, token in enumerate(out.token.tolist()):
        expected = tags.advance(int(state[n]), token) if token >= 0 else (int(state[n]), -1, 0)
        assert (int(out.tag_state[n]), int(out.tag[n]), int(out.overhang[n])) == expected


def test_a_broken_automaton_leaves_no_memory():
    logits = torch.zeros(1, 1)

    def broken(change) -> list[torch.Tensor]:
        arguments = op_arguments(logits, [0], StageTags([b"<A>"], ["<A>"]))
        change(arguments)
        OPS["native"].sample(*arguments)
        assert arguments[12].item() == 0
        return arguments

    def set_state(arguments):
        arguments[16][0] = 2**31 - 1

    def leave_table(arguments):
        arguments[8] = arguments[8] + 2**20

    def leave_bytes(arguments):
        arguments[11] = torch.tensor([0, 2**40])

    def start_below(arguments):
        arguments[11] = torch.tensor([-(2**40), 3])

    for change in (set_state, leave_table, leave_bytes, start_below):
        arguments = broken(change)
        assert arguments[17].item() == -1
        assert arguments[18].item() == 0
