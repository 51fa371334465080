"""Fused products: fewer of them and the same tokens, whatever becomes of the model."""

import copy
from collections import Counter

import pytest
import torch
from helpers.fused import NEW_TOKENS, Noting, attention, build, greedy, plain_greedy, products
from helpers.random_llava import FAMILIES
from torch import nn

from llava_cot.engine.fused import Part, fuse_products, gather_weights

pytestmark = pytest.mark.usefixtures("as_on_cuda")
EVERY_FAMILY = ["mllama", *FAMILIES, "qwen2_vl", "qwen3_vl", "qwen3_vl_moe", "glm4v", "glm4v_moe", "idefics3"]
# fused products by layer: attention and MLP, but no keys and values of an image, no experts, nothing that is fused
EXPECTED = {"mllama": 6, "qwen3_vl_moe": 3, "glm4v": 3}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_the_same_tokens_and_a_model_that_is_as_it_was(family, bare_generator, device):
    model, inputs = build(family)
    model, inputs = model.to(device), {key: each.to(device) for key, each in inputs.items()}
    untouched, parameters = copy.deepcopy(model), [*model.parameters()]
    for parameter in parameters[::3]:
        parameter.requires_grad_(False)
    with torch.no_grad():
        logits = model(**inputs).logits
    generator = bare_generator(model, page_size=4)
    assert len(products(generator)) == EXPECTED.get(family, 6)
    assert torch.equal(greedy(generator, inputs), plain_greedy(untouched, inputs))
    assert all(product.input is None and not product.parts for product in products(generator)), "nothing is held"

    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, logits)
    assert torch.equal(plain_greedy(model, inputs), plain_greedy(untouched, inputs))
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
    assert [p.requires_grad for p in parameters] == [index % 3 != 0 for index in range(len(parameters))]
    state, before = model.state_dict(), untouched.state_dict()
    assert [*state] == [*before]
    assert all(torch.equal(value, before[key]) and value.shape == before[key].shape for key, value in state.items())
    assert all(value.stride() == before[key].stride() for key, value in state.items())


def test_fewer_products_in_a_step(model, inputs, bare_generator):
    """Two layers of text have 7 matrices and 4 products, two of an image 5 matrices and 4 products in a step."""
    generator, counts = bare_generator(model), []
    for _ in range(2):
        ops = Counter()
        with Noting(lambda func, result, ops=ops: ops.update([func.overloadpacket.__name__])):
            greedy(generator, inputs)
        counts.append(ops["mm"] + ops["addmm"] + ops["linear"])
        for part in [each for each in generator.engine.view._model.modules() if isinstance(each, Part)]:
            part.__class__ = nn.Linear
    assert counts[1] - counts[0] == NEW_TOKENS * (2 * 3 + 2 * 1)


def test_one_compilation_for_all_layers():
    """Without a graph break, and for any number of rows."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    model, _ = build("llava")
    gather_weights(model)
    fuse_products(model)
    torch._dynamo.utils.counters.clear()

    def project(layer, x):
        attention, mlp = layer.self_attn, layer.mlp
        return attention.q_proj(x), attention.k_proj(x), attention.v_proj(x), mlp.gate_proj(x), mlp.up_proj(x)

    compiled = torch.compile(project, dynamic=True, fullgraph=True, backend="eager")
    with torch.inference_mode():
        for layer in model.model.language_model.layers:
            for rows in (2, 3, 7):
                x = torch.randn(1, rows, 32)
                assert all(map(torch.equal, compiled(layer, x), project(layer, x)))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert all(type(layer.mlp.up_proj) is Part for layer in model.model.language_model.layers)


def test_a_part_that_is_asked_for_twice_and_another_input():
    """Nothing depends on the order in which a layer calls its parts, or on whether it calls all of them."""
    torch.manual_seed(0)
    model, _ = build("llava")
    gather_weights(model)
    copied = copy.copy(model)
    mlp = copied.model.language_model.layers[0].mlp
    first, second = torch.randn(2, 5, 32).unbind()
    expected = {(name, id(x)): getattr(mlp, name)(x) for name in ("gate_proj", "up_proj") for x in (first, second)}
    fuse_products(copied)
    calls = [("up_proj", first), ("up_proj", first), ("gate_proj", first), ("gate_proj", second), ("up_proj", first)]
    for name, x in calls:
        assert type(getattr(mlp, name)) is Part
        torch.testing.assert_close(getattr(mlp, name)(x), expected[name, id(x)])


def step(model, inputs):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    for _ in range(2):
        optimizer.zero_grad()
        model(**inputs, labels=inputs["input_ids"] % 97).loss.backward()
        optimizer.step()


def load(model, inputs):
    model.load_state_dict({key: value.flip(0) for key, value in model.state_dict().items()})


def write(model, inputs):
    with torch.no_grad():
        attention(model).k_proj.weight.mul_(-1.5)


def replace_data(model, inputs):
    attention(model).k_proj.weight.data = attention(model).k_proj.weight.data * -1.5


def replace_parameter(model, inputs):
    attention(model).v_proj.weight = nn.Parameter(attention(model).v_proj.weight.detach() * -1.5)


def transpose(model, inputs):
    attention(model).q_proj.weight.data = attention(model).q_proj.weight.data.T


def convert(model, inputs):
    model.to(torch.float64)
    model.to(torch.float32)
    write(model, inputs)


def tie(model, inputs):
    attention(model).q_proj.weight = attention(model, 2).q_proj.weight


def tie_modules(model, inputs):
    attention(model).q_proj = attention(model, 2).q_proj


def share(model, inputs):
    model.share_memory()
    write(model, inputs)


def hook(model, inputs):
    attention(model).v_proj.register_forward_pre_hook(lambda module, args: (args[0].mul_(2),))


CHANGES = [step, load, write, replace_data, replace_parameter, transpose, convert, tie, tie_modules, share, hook]
# How many of the six products are left after each of two changes
LEAVES = {transpose: (5, 6), tie: (5, 5), tie_modules: (5, 5), share: (0, 0)}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_followed(model, inputs, bare_generator, change):
    """Twice, with a generator that has seen the first change."""
    generator = bare_generator(model)
    seen = [greedy(generator, inputs)]
    for count in LEAVES.get(change, (6, 6)):
        change(model, inputs)
        expected = plain_greedy(copy.deepcopy(model), inputs)
        assert torch.equal(greedy(generator, inputs), expected)
        assert torch.equal(plain_greedy(model, inputs), expected)
        assert len(products(generator)) == count
        seen.append(expected)
    assert not torch.equal(seen[0], seen[1]), "or the change shows nothing"


def test_half(model, inputs, bare_generator):
    generator = bare_generator(model)
    greedy(generator, inputs)
    model.to(torch.bfloat16)
    inputs = {key: each.to(torch.bfloat16) if each.is_floating_point() else each for key, each in inputs.items()}
    assert torch.equal(greedy(generator, inputs), greedy(bare_generator(copy.deepcopy(model)), inputs))
    assert {product.weight.dtype for product in products(generator)} == {torch.bfloat16}


def test_the_gradients_are_those_of_the_model(model, inputs, bare_generator):
    untouched = copy.deepcopy(model)
    generator = bare_generator(model)
    for each in (model, untouched):
        step(each, inputs)
    for (name, one), other in zip(model.named_parameters(), untouched.parameters(), strict=True):
        assert torch.equal(one, other), name
    assert torch.equal(greedy(generator, inputs), plain_greedy(untouched, inputs))


@pytest.mark.parametrize("safe", [False, True])
def test_an_adapter_of_peft(model, inputs, bare_generator, safe):
    peft = pytest.importorskip("peft")
    generator = bare_generator(model)
    before = greedy(generator, inputs)
    config = peft.LoraConfig(r=2, target_modules=r".*language_model.*(q_proj|v_proj)", init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    after = greedy(generator, inputs)
    assert torch.equal(after, plain_greedy(adapted, inputs)) and not torch.equal(after, before)
    assert torch.equal(greedy(bare_generator(adapted), inputs), after)
    merged = adapted.merge_and_unload(safe_merge=safe)
    assert merged is model
    assert torch.equal(greedy(generator, inputs), plain_greedy(copy.deepcopy(model), inputs))
    assert len(products(generator)) == 6


def test_a_pass_that_breaks_off_leaves_nothing_behind(model, inputs, bare_generator, monkeypatch):
    generator = bare_generator(model)
    expected = greedy(generator, inputs)
    part, calls = Part.forward, 0

    def failing(self, x):
        nonlocal calls
        calls += 1
        if calls == 47:  # a value's, whose query's and key's have been taken
            raise RuntimeError("out of memory")
        return part(self, x)

    monkeypatch.setattr(Part, "forward", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        greedy(generator, inputs)
    assert any(product.parts for product in products(generator))
    assert torch.equal(greedy(generator, inputs), expected)
    assert not any(product.parts for product in products(generator))
