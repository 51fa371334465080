"""The engine multiplies few rows with large weights by its own kernel, and draws the tokens that the model would."""

from functools import partial

import pytest
import torch
from helpers.random_mllama import build_random_mllama, random_inputs
from torch import nn
from transformers import AutoProcessor

from llava_cot import SwiresGenerator, tiny_path
from llava_cot.engine import linear as engine_linear
from llava_cot.engine.linear import MIN_ELEMENTS, linear, use_kernel
from llava_cot_kernels.backend import available
from llava_cot_kernels.linear import MOST_ROWS, few_row_linear

SHAPE = dict(hidden=512, layers=4, heads=8, kv_heads=8, cross=[1], vocab=600, ffn=1024)  # 512 * 512 is MIN_ELEMENTS
NEW_TOKENS = 12


@pytest.fixture
def products(monkeypatch):
    """The rows and the weight of every product by the kernel."""
    found = []

    def counted(x, weight, *rest):
        found.append((len(x), tuple(weight.shape)))
        return few_row_linear(x, weight, *rest)

    monkeypatch.setattr(engine_linear, "few_row_linear", counted)
    return found


def test_greedy_tokens_are_those_of_generate(products):
    model = build_random_mllama(**SHAPE, seed=0)
    model.generation_config.eos_token_id = None
    inputs = random_inputs(model, length=40, ratio_id=1, seed=1)
    expected = model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)
    assert not products  # the caller's model has its own products

    generator = SwiresGenerator(model, AutoProcessor.from_pretrained(tiny_path()))
    assert torch.equal(generator.generate(**inputs, search="greedy", max_new_tokens=NEW_TOKENS), expected)
    assert products.count((1, (1024, 512))) == 2 * 4 * (NEW_TOKENS - 1)  # gate and up of four layers
    assert max(rows for rows, _ in products) <= MOST_ROWS["cpu"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_is_for_few_rows_and_large_weights(products, dtype):
    large, small = nn.Linear(512, 512).to(dtype), nn.Linear(512, 511, bias=False).to(dtype)
    assert small.weight.numel() < MIN_ELEMENTS == large.weight.numel()
    model = nn.ModuleList([large, small])
    use_kernel(model)
    with torch.inference_mode():
        for x in (torch.randn(1, 3, 512), torch.randn(512), torch.randn(0, 512), torch.randn(2, MOST_ROWS["cpu"], 512)):
            for module in model:
                got, expected = module(x.to(dtype)), nn.functional.linear(x.to(dtype), module.weight, module.bias)
                torch.testing.assert_close(got, expected)
    assert products == [(3, (512, 512)), (1, (512, 512)), (0, (512, 512))]


def test_it_compiles_as_one_graph():
    module = nn.Linear(512, 512)
    use_kernel(nn.ModuleList([module]))
    compiled = torch.compile(lambda x: module(x) + 1, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.inference_mode():
        for rows in (1, 3, 7):
            x = torch.randn(rows, 512)
            assert torch.equal(compiled(x), module(x) + 1)


@pytest.mark.parametrize("quantized", [False, True])
def test_compiled_layers_share_their_code(quantized):
    model = nn.ModuleList(nn.Linear(512, 512) for _ in range(3))
    if quantized:
        quantize(model)
    use_kernel(model)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(lambda module, x: module(x), fullgraph=True, backend="eager")
    with torch.inference_mode():
        for module in model:
            compiled(module, torch.ones(2, 512))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_it_follows_the_weight():
    """The caller may change what a parameter holds, or its dtype."""
    model = nn.Sequential(nn.Linear(512, 512))
    use_kernel(model)
    x = torch.randn(2, 512)
    with torch.inference_mode():
        model[0].weight.data = torch.randn(512, 512) / 512**0.5
        torch.testing.assert_close(model(x), nn.functional.linear(x, model[0].weight, model[0].bias))
        model.half()
        torch.testing.assert_close(model(x.half()), nn.functional.linear(x.half(), model[0].weight, model[0].bias))


def quantize(model):
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig(set_inductor_config=False))


def test_weights_of_int8_are_read_as_they_are(products):
    for dtype in (torch.float32, torch.bfloat16):
        module = nn.Linear(512, 700).to(dtype)
        quantize(nn.Sequential(module))
        x = torch.randn(3, 512).to(dtype)
        with torch.inference_mode():
            got = linear(x, module.weight, module.bias)
            weight = module.weight.qdata.double() * module.weight.scale.double()
            exact = nn.functional.linear(x.double(), weight, module.bias.double())
        torch.testing.assert_close(got, exact.to(dtype))
    assert products == [(3, (700, 512))] * 2


def test_weights_with_a_scale_for_each_block_are_left_to_torchao(products):
    pytest.importorskip("torchao")
    from torchao.quantization import Int8Tensor, PerBlock, PerRow

    x, weight = torch.randn(2, 512), torch.randn(512, 512) + 0.5
    for granularity, count in ((PerBlock([2, 256]), 0), (PerRow(), 1)):
        quantized = Int8Tensor.from_hp(weight, granularity)
        torch.testing.assert_close(linear(x, quantized, None), nn.functional.linear(x, quantized), rtol=1e-4, atol=1e-4)
        assert len(products) == count


def test_rows_without_data_are_left_to_torch(products):
    module = nn.Linear(512, 512, device="meta")
    assert linear(torch.empty(2, 512, device="meta"), module.weight, None).is_meta
    assert linear(torch.empty(2, 512, device="meta"), nn.Linear(512, 512).weight, None).is_meta
    assert not products


def test_triton_draws_the_same_tokens(monkeypatch):
    """What a GPU does with int8 weights, in the interpreter."""
    if "triton" not in available("few_row_linear", "cpu"):
        pytest.skip("needs Triton's interpreter")
    monkeypatch.setattr(engine_linear, "MIN_ELEMENTS", 1)
    model = build_random_mllama(**SHAPE | dict(hidden=64, layers=2, heads=4, kv_heads=2, ffn=80), seed=0)
    quantize(model.get_decoder().layers)
    inputs = random_inputs(model, length=9, ratio_id=1, seed=1)
    drawn = []
    for backend in ("native", "triton"):
        monkeypatch.setattr(engine_linear, "few_row_linear", partial(few_row_linear, backend=backend))
        generator = SwiresGenerator(model, AutoProcessor.from_pretrained(tiny_path()))
        drawn.append(generator.generate(**inputs, search="greedy", max_new_tokens=5))
    assert torch.equal(*drawn)
