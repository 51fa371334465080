"""What a family's object answers, and that nothing but these objects knows one family from another."""

import ast
import re
from pathlib import Path

import pytest
import torch
from helpers import random_llava, random_qwen
from helpers.padding import left_padded
from helpers.random_mllama import TINY_SHAPE, build_random_mllama, random_inputs
from transformers import AutoProcessor

import llava_cot
from llava_cot.families import FAMILIES, family_of, training_of
from llava_cot.prompt import split_rows
from llava_cot.tiny_qwen import tiny_qwen_path

PACKAGE = Path(llava_cot.__file__).parent
NAME = re.compile(r"mllama|llava(?![-_ ]?cot)|qwen|gemma", re.IGNORECASE)
ONE_FAMILYS = {  # of an input, a setting or a module that not every family has
    "model_type",
    "aspect_ratio_ids",
    "aspect_ratio_mask",
    "cross_attention_mask",
    "cross_attention_layers",
    "cross_attn",
    "cross_rows",
    "image_grid_thw",
    "mm_token_type_ids",
    "token_type_ids",
    "mm_tokens_per_image",
    "multi_modal_projector",
    "vision_model",
    "get_rope_index",
}
# These make models: the bundled ones and the verifier, and random ones of every family.
MAKE_A_MODEL = ("bundled.py", "tiny_qwen/", "small_world/", "scoring/reward_model.py", "check/random_models.py")


def mllama_inputs(model, *, length, seed):
    return random_inputs(model, length=length, ratio_id=(1, 6)[seed % 2], seed=seed)


BUILDERS = {
    "mllama": (lambda: build_random_mllama(**TINY_SHAPE, seed=0), mllama_inputs),
    **random_llava.FAMILIES,
}
LENGTHS = (21, 34)


@pytest.fixture(scope="module", params=BUILDERS)
def case(request):
    """(model, its family, a processor's inputs of two prompts)"""
    build, make_inputs = BUILDERS[request.param]
    model = build()
    inputs = [make_inputs(model, length=length, seed=seed) for seed, length in enumerate(LENGTHS)]
    return model, family_of(model.config), inputs


def test_what_is_not_supported_is_named():
    config = type("Config", (), {"model_type": "llama"})()
    message = re.escape(f"model must be one of {sorted(FAMILIES)}, got model_type 'llama'")
    for lookup in (family_of, training_of):
        with pytest.raises(ValueError, match=message):
            lookup(config)
    config.model_type, config.vision_config = "llava", config
    message = r"one of \['mllama', 'qwen2_5_vl', 'qwen3_vl'\] to be trained, got model_type 'llava'"
    with pytest.raises(ValueError, match=message):
        training_of(config)


def test_the_inputs_are_named_with_their_dimensions(case):
    model, family, (inputs, _) = case
    assert set(inputs) == set(family.inputs)
    sizes = {}
    for name, dimensions in family.inputs.items():
        assert inputs[name].dim() == len(dimensions), name
        for dimension, size in zip(dimensions, inputs[name].shape):
            assert sizes.setdefault(dimension, size) == size, (name, dimension)
    assert (sizes["batch"], sizes["tokens"]) == (1, LENGTHS[0])
    for name in family.inputs:
        given = {**inputs, name: None}
        if name in family.optional:
            split_rows(given, model.config)
        else:
            with pytest.raises(ValueError, match=f"{name} must be given"):
                split_rows(given, model.config)


def test_a_batch_is_split_into_what_each_prompt_is_alone(case):
    model, family, inputs = case
    together = split_rows(left_padded(family, inputs), model.config)
    for prompt, each in zip(together, inputs, strict=True):
        (alone,) = split_rows(each, model.config)
        assert prompt.keys() == alone.keys() and all(torch.equal(prompt[name], alone[name]) for name in alone)
        assert torch.equal(prompt["input_ids"], each["input_ids"])


def test_prompts_are_stacked_and_numbered_as_each_is_alone(case):
    model, family, inputs = case
    prompts = [split_rows(each, model.config)[0] for each in inputs]
    assert family.image_shape(prompts[0]) == family.image_shape(prompts[1])
    stacked = family.stack(prompts)
    positions, offsets = family.positions(model, stacked, torch.tensor(LENGTHS))
    images = (stacked["input_ids"] == model.config.image_token_id).sum()
    assert images == sum((prompt["input_ids"] == model.config.image_token_id).sum() for prompt in prompts)
    for row, (prompt, length) in enumerate(zip(prompts, LENGTHS)):
        assert torch.equal(stacked["input_ids"][row, :length], prompt["input_ids"][0])
        alone, (offset,) = family.positions(model, prompt, torch.tensor([length]))
        assert torch.equal(positions[..., row, :length], alone[..., 0, :]) and offset == offsets[row]
        assert alone[..., -1].unique().item() + 1 == length + offset  # the next token's


def test_what_a_prompt_takes(case):
    model, family, inputs = case
    prompts = [split_rows(each, model.config)[0] for each in inputs]
    vision = model.config.vision_config
    for prompt, tiles in zip(prompts, (1, 4)):
        kept = family.stored_image_tokens(prompt)
        assert kept.dtype == torch.bool and kept.dim() == 1
        per_tile = (vision.image_size // vision.patch_size) ** 2 + 1 if family.cross_layers else 0
        assert family.image_tokens(prompt) == kept.sum() == tiles * per_tile
        assert family.pixel_values(prompt) == prompt["pixel_values"].numel()
    layers = model.model.language_model.layers
    assert set(family.cross_layers) == {index for index, layer in enumerate(layers) if hasattr(layer, "cross_attn")}
    assert family.pixel_values_per_pass.keys() == {"cpu", "cuda"}


def test_image_sizes_of_pixtral():
    """Without them images are as large as their pixels; a prompt keeps no more pixels than its images have."""
    build, make_inputs = BUILDERS["pixtral"]
    model = build()
    config = model.config
    inputs = make_inputs(model, length=30, seed=2, images=2)
    assert inputs["image_sizes"].tolist() == [[14 * 2, 14], [14 * 2, 14 * 3]]
    (prompt,) = split_rows(inputs, config)
    assert torch.equal(prompt["pixel_values"], inputs["pixel_values"])
    (first,) = split_rows({**make_inputs(model, length=9, seed=2), "pixel_values": inputs["pixel_values"][:1]}, config)
    assert first["pixel_values"].shape == (1, 3, 28, 14)
    whole = make_inputs(model, length=30, seed=3)
    (prompt,) = split_rows({**whole, "image_sizes": None}, config)
    assert torch.equal(prompt["image_sizes"], whole["image_sizes"])
    for sizes, message in (
        ([[28, 42], [28, 56]], r"image_sizes must be within pixel_values=\[28, 42\], got \[\[28, 42\], \[28, 56\]\]"),
        ([[28, 42], [28, 42]], r"input_ids\[0\] must have its images' tokens=12, got 8 image tokens"),
        ([[28, 42]], "image_sizes must have images=2 in dimension 0, got 1"),
        ([[28], [28]], "image_sizes must have sides=2 in dimension 1, got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            split_rows({**inputs, "image_sizes": torch.tensor(sizes)}, config)


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.training])
def test_every_parameter_is_of_one_part(name):
    if name in random_qwen.MODELS:
        model = random_qwen.build_random_qwen(name, AutoProcessor.from_pretrained(tiny_qwen_path()))
    else:
        model = BUILDERS[name][0]()
    parts = training_of(model.config).parts
    found = {part: 0 for part in parts}
    for parameter, _ in model.named_parameters():
        (part,) = (part for part, pattern in parts.items() if re.match(pattern, parameter))
        found[part] += 1
    assert all(found.values())


def modules():
    """(path in the package, syntax tree) of each module."""
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path.relative_to(PACKAGE).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def words(tree):
    """(line, identifier or string) of everything but comments, docstrings and the errors that are raised."""
    skipped = {id(node) for raised in ast.walk(tree) if isinstance(raised, ast.Raise) for node in ast.walk(raised)}
    skipped |= {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}  # docstrings
    for node in ast.walk(tree):
        if id(node) not in skipped:
            values = (value for _, value in ast.iter_fields(node) if isinstance(value, str))
            yield from ((getattr(node, "lineno", 0), value) for value in values)


def of_one_family(tree):
    return [
        f"{line}: {word}"
        for line, word in words(tree)
        if NAME.search(re.sub("llava_cot|QWEN_VL_PRM", "", word)) or ONE_FAMILYS.intersection(re.findall(r"\w+", word))
    ]


def test_no_other_module_asks_which_family_it_is():
    found = {
        path: hits
        for path, tree in modules()
        if not path.startswith(("families/", *MAKE_A_MODEL)) and (hits := of_one_family(tree))
    }
    assert not found


@pytest.mark.parametrize(
    "code",
    [
        'if config.model_type == "other": pass',
        'getattr(config, "model_type")',
        'kind = "mllama"',
        "from transformers import LlavaConfig",
        "import transformers.models.qwen2_5_vl",
        'x = inputs["image_grid_thw"]',
        'f"model.vision_model.{index}"',
        "def encode(aspect_ratio_ids): pass",
    ],
)
def test_the_search_finds(code):
    assert of_one_family(ast.parse(code))


def test_the_search_leaves_the_projects_own_name_and_that_of_a_reward_models_chats_alone():
    code = '"""For LLaVA and Qwen2.5-VL."""\nfrom llava_cot import LLAVA_COT\nname = "llava-cot, LLaVA-CoT-100k"'
    code += "\nfrom llava_cot.scoring import QWEN_VL_PRM"
    assert not of_one_family(ast.parse(code))


def test_families_import_neither_engine_nor_search():
    for path, tree in modules():
        if path.startswith("families/"):
            imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
            imported |= {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
            own = {name for name in imported if name.startswith("llava_cot.")}
            assert all(
                name.startswith(("llava_cot.families", "llava_cot.image", "llava_cot.stages")) for name in own
            ), path
