"""What only the Triton kernels of linear_logprobs have: two paths, chunks, parts, an order, and no host to raise."""

import pytest
import torch
from helpers.logprob import DTYPES, assert_as_exact_as_torch, draw, linear, plain_linear_logprobs, run

from llava_cot_kernels.backend import OPS, available
from llava_cot_kernels.reference import logprob as reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
kernels = pytest.importorskip("llava_cot_kernels.triton.logprob")


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture(params=["few rows", "many rows"])
def path(request, monkeypatch):
    """Either tile for the logits, whatever the number of rows."""
    tile, rows = kernels.logits_tile, {"few rows": 16, "many rows": 2048}[request.param]
    monkeypatch.setattr(kernels, "logits_tile", lambda num_rows, dtype: tile(rows, dtype))


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 128 tokens, summed in two parts, where the defaults would need thousands of tokens."""
    monkeypatch.setattr(kernels, "DLOGITS_BYTES", 0)
    monkeypatch.setattr(kernels, "MIN_CHUNK", 128)
    monkeypatch.setattr(kernels, "_new_parts", lambda hidden, chunk: hidden.new_empty(2, *hidden.shape).float())


def test_triton_is_a_back_end_of_this_run():
    assert "triton" in available("linear_logprobs", DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T, V, H", [(21, 400, 70), (33, 257, 64)])
def test_both_paths_in_chunks_match_float64(generator, path, small_chunks, dtype, T, V, H):
    hidden, weight, targets = draw(generator, T, V, H, dtype)
    grads = torch.randn(2, T, generator=generator)
    exact = run(reference.linear_logprobs, hidden.double(), weight.double(), targets, 1.3, grads)
    plain = run(plain_linear_logprobs, hidden, weight, targets, 1.3, grads)
    for ours, theirs, truth in zip(run(linear("triton"), hidden, weight, targets, 1.3, grads), plain, exact):
        assert_as_exact_as_torch(ours, theirs, truth)


def test_spans_of_several_tiles(generator, monkeypatch):
    """A running softmax over tiles whose largest logits rise, fall and are all masked."""
    monkeypatch.setattr(kernels, "logits_tile", lambda *_: kernels.Tile(16, 16, 16, 4, 2, max_spans=2))
    hidden, weight, targets = draw(generator, 9, 150, 8, torch.float32)
    weight *= torch.linspace(0, 6, 150)[:, None]
    weight[16:80, 0], hidden[:, 0] = -torch.inf, 1.0
    targets[:2] = torch.tensor([20, 149])
    expected = reference.linear_logprobs(hidden, weight, targets, entropy=True)
    torch.testing.assert_close(linear("triton")(hidden, weight, targets, entropy=True), expected)
    assert expected[0][0] == -torch.inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_runs_give_the_same_bits(generator, path, small_chunks, dtype):
    hidden, weight, targets = draw(generator, 20, 300, 40, dtype)
    grads = torch.randn(2, 20, generator=generator)
    first, second = (run(linear("triton"), hidden, weight, targets, 1.0, grads) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_a_row_does_not_depend_on_the_others(generator, path):
    hidden, weight, targets = draw(generator, 14, 300, 40, torch.bfloat16, ignored=0)
    together = torch.stack(linear("triton")(hidden, weight, targets, entropy=True))
    order = torch.randperm(14, generator=generator)
    moved = torch.stack(linear("triton")(hidden[order], weight, targets[order], entropy=True))
    assert torch.equal(moved, together[:, order])
    others_ignored = torch.full_like(targets, -100)
    others_ignored[9] = targets[9]
    alone = torch.stack(linear("triton")(hidden, weight, others_ignored, entropy=True))
    assert torch.equal(alone[:, 9], together[:, 9])


@pytest.mark.parametrize("kept", [[0], [16], [3, 4, 12], list(range(17))])
def test_ignored_rows_first_last_and_between(generator, path, kept):
    hidden, weight, targets = draw(generator, 17, 70, 9, torch.float32, ignored=0)
    ignored = torch.ones(17, dtype=torch.bool)
    ignored[kept] = False
    targets[ignored], hidden[ignored] = -100, torch.nan
    grads = torch.randn(2, 17, generator=generator)
    actual = run(linear("triton"), hidden, weight, targets, 1.0, grads)
    expected = run(reference.linear_logprobs, hidden, weight, targets, 1.0, grads)
    torch.testing.assert_close(actual, expected)


def ops_arguments(generator, targets):
    """The arguments of both ops, outputs full of NaN, on the device that Triton runs on."""
    hidden, weight, _ = draw(generator, len(targets), 41, 10, torch.float32)
    outputs = [torch.full((len(targets),), torch.nan) for _ in range(3)]
    grads = torch.ones(len(targets)), torch.ones(len(targets))
    gradients = torch.full_like(hidden, torch.nan), torch.full_like(weight, torch.nan)
    groups = grads, (hidden, weight, targets), outputs, gradients
    return [[tensor.to(DEVICE) for tensor in group] for group in groups]


def test_a_target_that_is_no_token_gives_nan_and_reads_nothing(generator):
    """On a device the host doesn't look at targets."""
    targets = torch.tensor([5, 41, -1, -100, 2**40, 2**32 + 3, 7])
    wrong = torch.tensor([False, True, True, False, True, True, False])
    grads, inputs, outputs, gradients = ops_arguments(generator, targets)
    OPS["triton"].linear_logprobs(*inputs, 1.0, *outputs)
    for output in outputs:
        assert torch.equal(output.cpu().isnan(), wrong)
    _, lse, entropy = outputs
    OPS["triton"].linear_logprobs_backward(*grads, *inputs, lse, entropy, 1.0, *gradients)
    assert torch.equal(gradients[0].cpu().isnan().all(1), wrong)
    assert torch.equal(gradients[0].cpu().isnan().any(1), wrong)


@pytest.mark.parametrize("needs_hidden, needs_weight", [(True, True), (True, False), (False, True)])
def test_opcheck_and_nothing_but_the_outputs_is_written(generator, needs_hidden, needs_weight):
    grads, inputs, outputs, gradients = ops_arguments(generator, torch.tensor([-100, 5, 40, -100, 0]))
    before = [tensor.clone() for tensor in (*grads, *inputs)]
    torch.library.opcheck(OPS["triton"].linear_logprobs.default, (*inputs, 1.0, *(out.clone() for out in outputs)))
    OPS["triton"].linear_logprobs(*inputs, 1.0, *outputs)
    assert torch.stack(outputs).isfinite().all()
    wanted = [grad if needed else None for grad, needed in zip(gradients, (needs_hidden, needs_weight))]
    arguments = (*grads, *inputs, *outputs[1:], 1.0, *wanted)
    torch.library.opcheck(OPS["triton"].linear_logprobs_backward.default, arguments)
    OPS["triton"].linear_logprobs_backward(*arguments)
    assert all(grad.isfinite().all() for grad in wanted if grad is not None)
    assert all(torch.equal(a, b) for a, b in zip(before, (*grads, *inputs)))
