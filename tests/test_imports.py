"""Imports point down: which layer of the packages may import which, held against the source of every module."""

import ast
from collections import Counter
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("llava_cot", "llava_cot_kernels")

# A layer is a module or a package with all that is in it, named without "llava_cot.". It may import the layers that
# are named here, what those may import, and so on. "torch" is torch and transformers. A layer that has none of it below
# works on a machine that has no model.
BELOW: dict[str, set[str]] = {
    "cli": {"serve", "evaluate", "check", "generator", "train", "annotate", "report", "scoring.verifier", "replay"},
    "replay": {"generator"},
    "check": {"generator"},
    "serve": {"workers"},
    "evaluate": {"workers", "data", "report", "journal", "llava_cot"},
    "workers": {"generator", "data", "scoring.verifier", "workers.names", "workers.run"},
    "workers.names": {"scoring"},
    "workers.run": {"workers.task"},
    "workers.task": {"core"},
    "generator": {"remote", "backends", "custom_generate", "prompt", "loading", "vocabulary", "checkpoint", "bundled"},
    "remote": {"backends.openai", "searcher"},
    "searcher": {"aio", "answer", "search", "question", "grammars"},
    "aio": {"stepper", "search", "answer", "question"},
    "stepper": {"core"},
    "custom_generate": {"answer", "engine", "families"},
    "backends": {"engine", "search"},
    "backends.openai": {"search", "endpoint"},
    "engine": {"families", "core", "quantize"},
    "families": {"llava_cot_kernels", "image", "stages"},
    "grammars": {"stages", "chat"},
    "llava_cot_kernels": {"torch"},
    "train": {"data", "families", "scoring.reward_model"},
    "annotate": {"data"},
    "data": {"endpoint", "journal", "scoring", "families", "image", "chat", "bundled"},
    "prompt": {"image", "question", "chat", "families", "core"},
    "question": {"literal"},
    "answer": {"trace"},
    "search": {"scoring", "detokenise", "image"},
    "scoring.verifier": {"scoring.reward_model", "tiny"},
    "scoring.reward_model": {"scoring", "checkpoint", "torch"},
    "scoring.step_reward": {"scoring.reward_model", "scoring.step_chat", "scoring.step_reader"},
    "scoring.step_chat": {"scoring", "prompt"},
    "scoring.step_reader": {"engine"},
    "scoring": {"core", "stages", "text", "trace", "literal", "chat"},
    "report": {"trace", "image"},
    "trace": {"core", "stages", "text", "atomic"},
    "llava_cot": set(),  # imports each name on its first use
    "core": set(),
    "stages": {"core"},
    "text": set(),
    "detokenise": set(),
    "vocabulary": {"llava_cot_kernels"},
    "bundled": {"tiny", "tiny_qwen"},
    "tiny": set(),
    "tiny_qwen": set(),
    "image": set(),
    "chat": {"literal"},
    "literal": set(),
    "loading": {"llava_cot_kernels"},
    "quantize": {"torch"},
    "checkpoint": set(),
    "journal": {"atomic"},
    "endpoint": {"pace"},
    "pace": set(),
    "atomic": set(),
    "torch": set(),
}

# Arrows of today that the table does not have: (module, layer) -> why.
EXCEPTIONS: dict[tuple[str, str], str] = {
    ("llava_cot.trace.trace", "report"): "Trace.to_html, and how a notebook shows a trace",
}


def imported(node: ast.AST) -> Iterator[str]:
    """The modules and names that ``node`` imports, inside functions too, except for type checkers alone."""
    if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
        for statement in node.orelse:
            yield from imported(statement)
        return
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"imports must be absolute, got {ast.unparse(node)}"
        yield from (f"{node.module}.{alias.name}" for alias in node.names)
    for child in ast.iter_child_nodes(node):
        yield from imported(child)


def layer_of(name: str) -> str | None:
    """The layer of a module or of a name in it, and None for other people's packages."""
    top, *rest = name.split(".")
    if top in ("torch", "transformers"):
        return "torch"
    if top in ("tools", "tests", "benchmarks", "helpers"):
        return top
    if top not in PACKAGES:
        return None
    path = rest if top == "llava_cot" else [top]
    prefixes = (".".join(path[:length]) for length in range(len(path), 0, -1))
    return next((prefix for prefix in prefixes if prefix in BELOW), path[0] if path else top)


@cache
def all_below(layer: str) -> frozenset[str]:
    return frozenset().union(*({lower} | all_below(lower) for lower in BELOW.get(layer, ())))


def upward(sources: dict[str, str]) -> set[tuple[str, str]]:
    """(module, layer) of each arrow that leaves the layer of the module and does not point down."""
    arrows = {(module, layer_of(name)) for module, source in sources.items() for name in imported(ast.parse(source))}
    return {
        (module, layer)
        for module, layer in arrows
        if layer is not None and layer != layer_of(module) and layer not in all_below(layer_of(module) or "")
    }


@pytest.fixture(scope="module")
def sources() -> dict[str, str]:
    """Every module of both packages."""
    paths = [path.relative_to(ROOT) for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    names = [".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in paths]
    return {name: (ROOT / path).read_text("utf-8") for name, path in zip(names, paths)}


@pytest.fixture(scope="module")
def found(sources) -> set[tuple[str, str]]:
    return upward(sources)


def test_every_module_has_a_layer_and_the_layers_an_order(sources):
    assert {layer_of(module) for module in sources} <= set(BELOW)
    assert set().union(*BELOW.values()) <= set(BELOW)
    TopologicalSorter(BELOW).prepare()  # raises at a cycle


def test_every_import_points_down(found):
    assert sorted(found - set(EXCEPTIONS)) == []


def test_no_exception_is_left_over(found):
    assert sorted(set(EXCEPTIONS) - found) == []


def test_an_arrow_is_found_wherever_it_stands():
    source = """
from typing import TYPE_CHECKING
import json, torch.nn
from llava_cot import text
from llava_cot.engine import engine
if TYPE_CHECKING:
    from llava_cot.generator import SwiresGenerator
else:
    import llava_cot.train.config
def later():
    from transformers import AutoModel
    import tools.small_world.world
"""
    arrows = upward({"llava_cot.scoring.vote": source, "llava_cot.engine.engine": source})
    found = {module: {layer for other, layer in arrows if other == module} for module, _ in arrows}
    assert found["llava_cot.scoring.vote"] == {"torch", "engine", "train", "tools"}
    assert found["llava_cot.engine.engine"] == {"text", "train", "tools"}
    with pytest.raises(AssertionError, match=r"imports must be absolute, got from \. import text"):
        upward({"llava_cot.scoring.vote": "from . import text"})


def test_names_of_test_files_are_unique():
    """pytest imports each test file by its name alone, so that of two equal names it refuses the second."""
    names = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []
