"""The version has one place, types are shipped, and the CI's variables reach the commands that install."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import llava_cot
import llava_cot_kernels
from llava_cot.bundled import BUNDLED

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
NOT_INSTALLED = "0+unknown"


def test_both_packages_have_the_version_of_pyproject():
    assert llava_cot.__version__ == llava_cot_kernels.__version__
    assert llava_cot.__version__ in (PYPROJECT["project"]["version"], NOT_INSTALLED)


def test_the_version_needs_no_torch():
    code = "import sys, llava_cot; llava_cot.__version__; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("package", [llava_cot, llava_cot_kernels])
def test_the_version_of_a_source_tree_that_is_not_installed(package, monkeypatch):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert package.__version__ == NOT_INSTALLED


@pytest.mark.parametrize("package", [llava_cot, llava_cot_kernels])
def test_types_are_shipped(package):
    assert (Path(package.__file__).parent / "py.typed").is_file()
    assert "py.typed" in PYPROJECT["tool"]["setuptools"]["package-data"][package.__name__]


@pytest.mark.parametrize("name", BUNDLED)
def test_the_bundled_models_are_shipped(name):
    folder = BUNDLED[name]()
    patterns = PYPROJECT["tool"]["setuptools"]["package-data"][f"llava_cot.{folder.name}"]
    shipped = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    tracked = {path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert tracked <= shipped


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_takes_what_to_install_from_the_environment(tmp_path):
    """So does .ci/run, which calls it; it says what it would do, and does nothing."""
    chosen = {
        "PYTHON": "python9",
        "TORCH": "torch==9.1",
        "TRANSFORMERS": "transformers==9.2",
        "VENV": f"{tmp_path}/venv",
    }
    made = subprocess.run(
        ["make", "--dry-run", "lint", "test"], cwd=ROOT, env=os.environ | chosen, capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr
    assert f"python9 -m venv {tmp_path}/venv" in made.stdout
    assert '"torch==9.1"' in made.stdout and '"transformers==9.2"' in made.stdout
    assert f"{tmp_path}/venv/bin/ruff check" in made.stdout and f"{tmp_path}/venv/bin/python -m pytest" in made.stdout
