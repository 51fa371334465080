"""A random model and its inputs, what an engine makes of it, and what the engine has fused."""

from torch.utils._python_dispatch import TorchDispatchMode

from helpers.random_mllama import TINY_SHAPE, build_random_mllama, random_inputs
from llava_cot.check.random_models import build_model, make_inputs
from llava_cot.engine.fused import Part

NEW_TOKENS = 16


def build(family, seed=0):
    """(a random model, inputs of one prompt)"""
    if family == "mllama":
        model = build_random_mllama(**TINY_SHAPE, seed=seed)
        return model, random_inputs(model, length=13, ratio_id=6, seed=seed)
    model = build_model(family, seed=seed)
    return model, make_inputs(model, length=30, seed=seed)


def attention(model, layer=0):
    return model.model.language_model.layers[layer].self_attn


def greedy(generator, inputs):
    return generator.generate(**inputs, search="greedy", max_new_tokens=NEW_TOKENS)


def plain_greedy(model, inputs):
    return model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)


def products(generator):
    """The engine's fused products, each once."""
    parts = [module for module in generator.engine.view._model.modules() if isinstance(module, Part)]
    return list({id(part.product): part.product for part in parts}.values())


def addresses(model):
    return [parameter.data_ptr() for parameter in model.parameters()]


class Noting(TorchDispatchMode):
    """Calls ``note(op, result)`` after every op."""

    def __init__(self, note):
        super().__init__()
        self.note = note

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.note(func, result)
        return result
