"""The engine answers as the model is when it is asked, not as it was when the engine was made."""

import copy
import functools

import pytest
import torch
from torch import nn

from llava_cot import EngineConfig, SwiresGenerator
from llava_cot.data import shapes

SAMPLE = shapes.sample(806_000)
OTHER = shapes.sample(806_001)


class Adapted(nn.Module):
    """A layer with a low-rank adapter beside it, of the kind that is switched by plain attributes."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base, self.enabled, self.active, self.merged = base, True, ["first"], {"first": False}
        self.down = nn.Parameter(torch.randn(2, base.in_features) * 0.3)
        self.up = nn.Parameter(torch.randn(base.out_features, 2) * 0.3)

    def forward(self, x):
        out = self.base(x)
        if self.enabled and "first" in self.active and not self.merged["first"]:
            out = out + x @ self.down.T @ self.up.T
        return out


@pytest.fixture
def model(tiny):
    return copy.deepcopy(tiny.model)


@pytest.fixture
def make(tiny):
    return lambda model, **config: SwiresGenerator(model, tiny.processor, engine=EngineConfig(**config))


def tokens(generator, sample=SAMPLE):
    return generator.answer(sample.image, sample.question, "greedy", max_new_tokens=24).tokens


def attention(model):
    return model.model.language_model.layers[0].self_attn


def adapt(model):
    torch.manual_seed(1)
    attention(model).q_proj = Adapted(attention(model).q_proj)
    return attention(model).q_proj


def disable(model):
    attention(model).q_proj.enabled = False


def switch(model):
    attention(model).q_proj.active[0] = "second"


def merge(model):
    adapter = attention(model).q_proj
    with torch.no_grad():
        adapter.base.weight += adapter.up @ adapter.down
    adapter.merged["first"] = True


def replace_parameter(model):
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.flip(0).clone())


def replace_tensor(model):
    model.lm_head.weight.data = model.lm_head.weight.data.flip(0).clone()


def write_values(model):
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight.flip(0))


def remove_layer(model):
    del model.model.language_model.layers[-1]
    model.config.text_config.num_hidden_layers -= 1


CHANGES = {
    "an adapter attached": (None, adapt),
    "an adapter disabled": (adapt, disable),
    "an adapter switched": (adapt, switch),
    "a parameter replaced": (None, replace_parameter),
    "a parameter's tensor replaced": (None, replace_tensor),
    "values written": (None, write_values),
    "a hook": (None, lambda model: model.lm_head.register_forward_hook(lambda module, given, out: out.flip(-1))),
    "another dtype": (None, lambda model: model.to(torch.bfloat16)),
    "a layer removed": (None, remove_layer),
}


def test_a_model_need_not_be_followed(model, make):
    generator = make(model, follow_model=False)
    before = tokens(generator)
    adapt(model)
    assert tokens(make(model)) != before == tokens(generator)


@pytest.mark.parametrize("prepare, change", CHANGES.values(), ids=CHANGES)
def test_a_changed_model_is_followed(model, make, prepare, change):
    if prepare:
        prepare(model)
    generator = make(model)
    before = tokens(generator)
    change(model)
    assert tokens(generator) == tokens(make(model))
    assert generator.engine.view.dtype == model.dtype
    if model.dtype == torch.float32:
        assert tokens(generator) != before, "or the change shows nothing"


def test_a_dtype_that_no_kernel_has(model, make):
    generator = make(model)
    expected = tokens(generator)
    model.to(torch.float64)
    for ask in (lambda: make(model), lambda: tokens(generator), lambda: tokens(generator)):
        with pytest.raises(ValueError, match=r"model must be in float32, bfloat16 or float16, got torch\.float64"):
            ask()
    model.to(torch.float32)
    assert tokens(generator) == expected


def test_a_merged_adapter_does_not_count_twice(model, make):
    adapt(model)
    generator = make(model)
    before = tokens(generator)
    merge(model)
    assert tokens(generator) == before


def test_an_unchanged_model_keeps_its_pages(model, make):
    generator = make(model)
    pages = generator.engine.view.kv_cache
    model.train()
    tokens(generator)
    assert generator.engine.view.kv_cache is pages and model.training


def test_a_change_while_a_search_runs(model, make):
    generator = make(model)
    expected = tokens(generator)
    stream = generator.stream(SAMPLE.image, SAMPLE.question, "greedy", max_new_tokens=24)
    next(stream)
    adapt(model)
    with pytest.raises(RuntimeError, match="the model must not be changed while searches run on it"):
        tokens(generator, OTHER)
    *_, finished = stream
    assert finished.answer.tokens == expected, "it goes on with the model that it began with"
    assert tokens(generator, OTHER) == tokens(make(model), OTHER)


@pytest.mark.parametrize("form", [int, list, tuple, torch.tensor], ids=["int", "list", "tuple", "tensor"])
@pytest.mark.parametrize("steps_per_look", [1, 4])
def test_ends_that_are_set_later(model, make, form, steps_per_look):
    generator = make(model, steps_per_look=steps_per_look)
    whole = tokens(generator)
    end = whole[9]
    model.generation_config.eos_token_id = end if form is int else form([end, whole[15]])
    answer = generator.answer(SAMPLE.image, SAMPLE.question, "greedy", max_new_tokens=24)
    assert answer.tokens == whole[: whole.index(end) + 1] and len(answer.tokens) <= 10
    model.generation_config.eos_token_id = None
    assert len(tokens(generator)) == 24


def test_too_many_ends(model, make):
    generator = make(model)
    model.generation_config.eos_token_id = list(range(40))
    with pytest.raises(ValueError, match="eos_token_id must have at most 32 ids, got 40"):
        tokens(generator)
    assert generator.engine.pages_in_use == 0


@pytest.mark.parametrize("where", ["the model", "model.vision_model"])
def test_a_replaced_forward_is_refused(model, make, where):
    module = model if where == "the model" else model.get_submodule(where)
    original = module.forward
    module.forward = functools.partial(original)
    message = f"model must not have a replaced forward, got one on {where!r}: unwrap it, and use"
    with pytest.raises(ValueError, match=message):
        make(model)
    del module.forward
    generator = make(model)
    expected = tokens(generator)
    module.forward = lambda *args, **kwargs: original(*args, **kwargs)
    with pytest.raises(ValueError, match=message):
        tokens(generator)
    del module.forward
    assert tokens(generator) == expected


def test_autocast(model, make):
    """It is refused where a search is started; a stream that is read under it does not notice."""
    generator = make(model)
    expected = tokens(generator)
    stream = generator.stream(SAMPLE.image, SAMPLE.question, "greedy", max_new_tokens=24)
    next(stream)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        *_, finished = stream
        assert finished.answer.tokens == expected
        with pytest.raises(TypeError, match=r"torch\.autocast must be off"):
            tokens(generator)


@pytest.mark.parametrize(
    "swap, message",
    [
        (lambda g: (g.processor, g.model), "model must be a transformers model, got MllamaProcessor"),
        (lambda g: ("tiny", g.processor), "model must be a transformers model, got str"),
        (lambda g: (None, g.processor), "model must be a transformers model, got NoneType"),
        (lambda g: (g.model, g.processor.tokenizer), r"processor must be the model's processor, got \w*Tokenizer"),
        (lambda g: (g.model, g.processor.image_processor), "processor must be the model's processor, got Mllama"),
    ],
)
def test_what_is_no_model_or_processor(tiny, swap, message):
    with pytest.raises(TypeError, match=message):
        SwiresGenerator(*swap(tiny))
