"""Weights in one buffer: their owner can't tell, and what may not move stays where it is."""

import copy
import gc
import io
import pickle

import pytest
import torch
from helpers.fused import Noting, addresses, attention, build, greedy, plain_greedy, products
from safetensors.torch import load_file, save_file
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.testing._internal.two_tensor import TwoTensor

from llava_cot.engine.follow import state_of
from llava_cot.engine.fused import gather_weights

pytestmark = pytest.mark.usefixtures("as_on_cuda")


def test_nothing_moves_on_a_cpu(model, bare_generator, monkeypatch):
    monkeypatch.undo()
    before = addresses(model)
    assert not products(bare_generator(model)) and addresses(model) == before


def test_saving(model, inputs, bare_generator, tmp_path):
    """Files as large as before, with no tensor in them twice, and nothing that a reader of tensors refuses."""
    before, after = tmp_path / "before", tmp_path / "after"
    model.save_pretrained(before)
    pickled, saved = len(pickle.dumps(model)), io.BytesIO()
    torch.save(model.state_dict(), saved)
    bare_generator(model)

    model.save_pretrained(after)
    for name in ("model.safetensors", "config.json"):
        assert (after / name).read_bytes() == (before / name).read_bytes()
    assert torch.equal(plain_greedy(type(model).from_pretrained(after), inputs), plain_greedy(model, inputs))
    save_file(model.state_dict(), tmp_path / "state.safetensors")
    assert load_file(tmp_path / "state.safetensors").keys() == model.state_dict().keys()
    again = io.BytesIO()
    torch.save(model.state_dict(), again)
    assert len(again.getvalue()) == len(saved.getvalue())
    one = io.BytesIO()
    torch.save(attention(model).q_proj.weight, one)
    assert len(one.getvalue()) < attention(model).q_proj.weight.nbytes + 2048, "and not that of its neighbours"
    assert len(pickle.dumps(model)) == pickled


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_independent(model, inputs, bare_generator, how):
    generator = bare_generator(model)
    expected = greedy(generator, inputs)
    copied = how(model)
    assert torch.equal(plain_greedy(copied, inputs), expected)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert torch.equal(greedy(generator, inputs), expected)
    assert torch.equal(plain_greedy(model, inputs), expected)


def test_a_second_engine_uses_the_same_buffers(model, inputs, bare_generator):
    first = bare_generator(model)
    moved, pages = addresses(model), first.engine.view.kv_cache
    second = bare_generator(model)
    assert addresses(model) == moved
    assert all(a.weight is b.weight for a, b in zip(products(first), products(second), strict=True))
    assert torch.equal(greedy(first, inputs), greedy(second, inputs))
    assert first.engine.view.kv_cache is pages, "the first has nothing to follow"
    del first
    assert all(a.weight is b.weight for a, b in zip(products(second), products(bare_generator(model)), strict=True))


def tied(model):
    attention(model).k_proj.weight = attention(model).v_proj.weight


def flat(model):
    weights = [attention(model).q_proj.weight, attention(model).k_proj.weight]
    whole = torch.cat([weight.detach().flatten() for weight in weights])
    for weight, part in zip(weights, whole.split([weight.numel() for weight in weights])):
        weight.data = part.view_as(weight)
    return whole


def kept(model):
    return model.state_dict()["model.language_model.layers.0.self_attn.k_proj.weight"]


def numpy(model):
    return attention(model).k_proj.weight.detach().numpy()


def shared(model):
    attention(model).v_proj.weight.share_memory_()


def biased(model):
    attention(model).k_proj.bias = nn.Parameter(torch.randn(attention(model).k_proj.out_features))


def adapted(model):
    class Scaled(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 1.5

    attention(model).q_proj.__class__ = attention(model).k_proj.__class__ = Scaled


def parametrised(model):
    class Symmetric(nn.Module):
        def forward(self, weight):
            return weight.abs()

    for name in ("q_proj", "v_proj"):
        nn.utils.parametrize.register_parametrization(getattr(attention(model), name), "weight", Symmetric())


LEFT_ALONE = [tied, flat, kept, numpy, shared, biased, adapted, parametrised]


@pytest.mark.parametrize("prepare", LEFT_ALONE)
def test_what_is_left_alone(model, inputs, bare_generator, prepare):
    alias = prepare(model)  # it lives as long as the test
    before = {name: each.data_ptr() for name, each in attention(model).named_parameters() if "weight" in name}
    generator = bare_generator(model)
    after = {name: each.data_ptr() for name, each in attention(model).named_parameters() if "weight" in name}
    assert before == after
    assert len(products(generator)) == 5, "all of the others"
    assert torch.equal(greedy(generator, inputs), plain_greedy(copy.deepcopy(model), inputs))
    if alias is not None:
        alias[:] = alias[:] * -1.5  # behind the back of the parameters
        assert torch.equal(greedy(generator, inputs), plain_greedy(copy.deepcopy(model), inputs))


def test_what_would_not_be_aligned(bare_generator):
    """In 16 bits the biases of keys are 32 bytes."""
    model, _ = build("qwen2_5_vl")
    assert len(products(bare_generator(model.to(torch.bfloat16)))) == 3, "those of the MLPs"


def test_weights_of_several_parts(model):
    """As those that torchao quantises."""
    linear = attention(model).q_proj
    linear.weight = nn.Parameter(TwoTensor(linear.weight.detach(), linear.weight.detach().clone()))
    others = [attention(model).k_proj.weight.data_ptr(), attention(model).v_proj.weight.data_ptr()]
    gather_weights(model)
    assert type(linear.weight) is TwoTensor
    assert others[1] != attention(model).v_proj.weight.data_ptr(), "the other two are fused"
    assert state_of(model) == state_of(model)


def test_a_model_that_is_loaded_in_inference_mode(inputs, bare_generator):
    with torch.inference_mode():
        model, _ = build("mllama")
    generator = bare_generator(model)
    assert not products(generator)
    assert torch.equal(greedy(generator, inputs), plain_greedy(model, inputs))


def test_keys_and_values_of_an_image_stay_where_they_are(model, bare_generator):
    cross = model.model.language_model.layers[1].cross_attn
    before = [parameter.data_ptr() for parameter in cross.parameters()]
    bare_generator(model)
    assert [parameter.data_ptr() for parameter in cross.parameters()] == before


def test_no_second_copy_at_any_time(model):
    """Each buffer is filled and the weights behind it are freed before the next is allocated."""
    layers = model.model.language_model.layers
    old = {name: (StorageWeakRef(p.untyped_storage()), p.nbytes) for name, p in layers.named_parameters()}
    buffers, peaks = [], []

    def note(func, result):
        if func.overloadpacket.__name__ == "empty":
            buffers.append(result.nbytes)
            freed = sum(nbytes for storage, nbytes in old.values() if storage.expired())
            peaks.append(sum(buffers) - freed)

    with Noting(note):
        gather_weights(model)
    assert peaks == buffers and len(buffers) == 6
    moved = sum(nbytes for storage, nbytes in old.values() if storage.expired())
    assert moved == sum(buffers)


def test_nothing_outlives_the_model(inputs, bare_generator):
    model, _ = build("mllama")
    generator = bare_generator(model)
    greedy(generator, inputs)
    buffers = [StorageWeakRef(product.weight.untyped_storage()) for product in products(generator)]
    weight = attention(model).q_proj.weight
    expected = weight.detach().clone()
    del model, generator
    gc.collect()
    alive = [not buffer.expired() for buffer in buffers]
    assert sum(alive) == 1 and torch.equal(weight, expected), "the one that a parameter is part of"
    del weight
    assert all(buffer.expired() for buffer in buffers)
