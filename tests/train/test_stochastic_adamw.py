"""Rounding at random: right on average, where rounding to the nearest moves nothing."""

import pytest
import torch

from llava_cot.train.stochastic_adamw import StochasticAdamW, round_stochastically_


def test_rounds_to_a_neighbour_and_is_right_on_average():
    torch.manual_seed(0)
    value = torch.randn(64).repeat(4000, 1)
    target = torch.empty_like(value, dtype=torch.bfloat16)
    exact = value[0].double()
    round_stochastically_(target, value)
    found = target.double()
    step = 2.0**-7 * 2.0 ** exact.abs().log2().floor()  # from one bfloat16 to the next
    assert ((found - exact).abs() < step).all()
    assert (found.mean(0) - exact).abs().le(5 * step / 2 / 4000**0.5).all()


def test_what_bfloat16_holds_stays():
    value = torch.tensor([0.0, -0.0, 1.0, -3.5, 2.0**-126])
    target = torch.full((5,), torch.nan, dtype=torch.bfloat16)
    round_stochastically_(target, value.clone())
    assert target.float().equal(value)


def test_moves_as_float32_does_where_plain_bfloat16_stands_still():
    torch.manual_seed(0)
    start = torch.full((20_000,), 0.5)
    ends = {}
    for name, dtype, optimizer in (
        ("float32", torch.float32, torch.optim.AdamW),
        ("bfloat16", torch.bfloat16, torch.optim.AdamW),
        ("stochastic", torch.bfloat16, StochasticAdamW),
    ):
        weight = torch.nn.Parameter(start.to(dtype, copy=True))
        steps = optimizer([weight], lr=1e-5, weight_decay=0.0)
        for _ in range(300):
            weight.grad = torch.ones_like(weight)
            steps.step()
        ends[name] = weight.double().mean().item()
    assert ends["float32"] == pytest.approx(0.497, abs=1e-5)
    assert ends["stochastic"] == pytest.approx(ends["float32"], rel=1e-4)
    assert ends["bfloat16"] == 0.5


def test_equal_random_states_give_equal_bits():
    def run():
        torch.manual_seed(3)
        weight = torch.nn.Parameter(torch.randn(100).bfloat16())
        steps = StochasticAdamW([weight], lr=1e-3, weight_decay=0.1)
        for _ in range(5):
            weight.grad = torch.randn(100).bfloat16()
            steps.step()
        return weight.detach()

    assert torch.equal(run(), run())


def test_float32_is_refused():
    with pytest.raises(ValueError, match=r"params must be bfloat16, got torch\.float32"):
        StochasticAdamW([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
