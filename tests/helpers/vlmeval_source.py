"""Functions of the installed VLMEvalKit without its imports, which need a hundred packages and turn TLS checks off."""

import ast
import sys
import types
from contextlib import contextmanager
from importlib.machinery import PathFinder
from pathlib import Path

import pytest

MISSING = "could not import 'vlmeval': pip install --no-deps ms-vlmeval==0.0.20"
PLUGIN = "llava_cot.evaluate.plugins.vlmevalkit"


def vlmeval_functions(module, *names, **needed):
    """Return the functions ``names`` of a module such as "utils/matching_util.py", or skip the test.

    ``needed`` is what they use of other modules of VLMEvalKit.
    """
    spec = PathFinder.find_spec("vlmeval")
    if spec is None:
        pytest.skip(MISSING)
    path = Path(spec.submodule_search_locations[0]) / module
    body = [node for node in ast.parse(path.read_text(encoding="utf-8")).body if _is_wanted(node, names)]
    namespace = dict(needed)
    exec(compile(ast.Module(body, []), str(path), "exec"), namespace)
    found = tuple(namespace[name] for name in names)
    return found[0] if len(found) == 1 else found


def _is_wanted(node, names):
    if isinstance(node, ast.Import):
        return all(alias.name.partition(".")[0] in sys.stdlib_module_names for alias in node.names)
    if isinstance(node, ast.ImportFrom):
        return node.level == 0 and node.module.partition(".")[0] in sys.stdlib_module_names
    return isinstance(node, ast.FunctionDef) and node.name in names


@contextmanager
def bare_vlmeval():
    """Let ``vlmeval.vlm.base``, ``vlmeval.inference`` and ``vlmeval.smp`` be imported without all models and datasets.

    Their parent packages import everything there is when they are initialised. Here they are initialised as empty ones.
    Yields the dictionary of models, which is ``vlmeval.config.supported_VLM``.
    """
    spec = PathFinder.find_spec("vlmeval")
    if spec is None:
        pytest.skip(MISSING)
    before = {name for name in sys.modules if name.partition(".")[0] == "vlmeval"}
    assert not before, "VLMEvalKit must not have been imported, since its initialisation changes the process"
    root = Path(spec.submodule_search_locations[0])
    for name in ("vlmeval", "vlmeval.vlm", "vlmeval.dataset", "vlmeval.config"):
        module = sys.modules[name] = types.ModuleType(name)
        module.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
        if "." in name:
            setattr(sys.modules["vlmeval"], name.partition(".")[2], module)
    sys.modules["vlmeval.dataset"].DATASET_TYPE = None  # only used for videos
    models = sys.modules["vlmeval.config"].supported_VLM = {}
    try:
        for name in ("vlmeval.vlm.base", "vlmeval.inference"):
            pytest.importorskip(name, exc_type=ImportError)
        yield models
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "vlmeval" or name == PLUGIN]:
            del sys.modules[name]
