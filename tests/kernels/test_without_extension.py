"""Without the compiled extension the reference works, and everything else says how to build it."""

import json
import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import llava_cot_kernels

PACKAGE = Path(llava_cot_kernels.__file__).parent
HIDDEN = 'import sys; sys.modules["llava_cot_kernels._C"] = None\n'  # its import fails, as where there is no such file
REFERENCE = """
import torch
from llava_cot_kernels import StageTags
from llava_cot_kernels.reference import attention, logprob, page_pool, paged_kv, sampling, stage_tags

torch.manual_seed(0)
logits, query, keys = torch.randn(3, 50), torch.randn(3, 4, 8), torch.randn(2, 6, 4, 2, 8)
parameters = [torch.full((3,), value) for value in (0.7, 10, 0.9, 0.0)]
row, seed, position = torch.tensor([2, 0, 0]), torch.tensor([1, 2, 3]), torch.tensor([4, 5, 6])
page_table = torch.tensor([[1, 4], [2, 0], [3, 5]], dtype=torch.int32)
seq_lens, starts = torch.tensor([7, 2, 8], dtype=torch.int32), torch.arange(4, dtype=torch.int32)
token, *_ = sampling.sample(logits, row, *parameters, seed, position)
print(token, logprob.token_logprobs(logits, token), logprob.linear_logprobs(query[:, 0], keys[0, 0, 0], token % 2))
print(attention.paged_attention(query, *keys, page_table, seq_lens, starts, 0.5))
print(attention.shared_attention(query, *keys.flatten(1, 2), starts[:3], starts * 8, 0.5))
paged_kv.store_kv(query[:, :2], query[:, :2], *keys, torch.tensor([0, -1, 5]))
paged_kv.copy_pages(keys[:, None], torch.tensor([[0, 5]], dtype=torch.int32))
print(keys[:, 5])
print(stage_tags.advance(StageTags([b"/A>"], ["</A>"]), torch.tensor([1], dtype=torch.int32), torch.tensor([0])))
pool = page_pool.PagePool(3, 4)
seq = pool.create()
pool.append([seq], [6])
kids = pool.fork(seq, 2)
print(pool.append(kids[:1], [1]), pool.page_table(kids))
try:
    pool.append(kids, [0, 1])
except page_pool.OutOfPages as error:
    print(error)
"""


def run(code, **options):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


HOW = (
    "install torch 2.11 or newer first, and then build the extension with `pip install -e .` or with "
    "`python setup.py build_ext --inplace`"
)
ASK = """
import importlib, json
import llava_cot_kernels

def error(ask):
    try:
        ask()
    except ImportError as error:
        return str(error)

def use(name):
    return lambda: getattr(llava_cot_kernels, name)

def imports(module):
    return lambda: importlib.import_module(module)

kernels = [name for name in llava_cot_kernels.__all__ if name != "StageTags"]
modules = ["attention", "backend", "info", "logprob", "page_pool", "paged_kv", "sampling"]
errors = [error(use(name)) for name in kernels]
errors += [error(imports(f"llava_cot_kernels.{module}")) for module in modules]
errors += [error(imports("llava_cot.generator"))]
print(json.dumps(errors))
"""
COMMAND = """
import contextlib, io, json, sys, tempfile
from PIL import Image
from llava_cot.cli import main

image = tempfile.NamedTemporaryFile(suffix=".png")
Image.new("RGB", (8, 8)).save(image.name)
sys.argv = ["llava-cot", "answer", image.name, "How many?"]
out, err, code = io.StringIO(), io.StringIO(), None
with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
    try:
        main()
    except SystemExit as error:
        code = error.code
print(json.dumps([code, out.getvalue(), err.getvalue()]))
"""


def test_the_reference_works_and_all_else_says_how_to_build_it(capsys):
    """One process without the extension: what it asks for in vain comes first, and the reference works after that."""
    exec(REFERENCE, {})
    expected = capsys.readouterr().out
    assert expected.endswith("append needs 1 pages, 0 are free\n")
    asked, command, reference = run(HIDDEN + ASK + COMMAND + REFERENCE).split("\n", 2)
    assert reference == expected

    errors = json.loads(asked)
    assert len(errors) == len(llava_cot_kernels.__all__) + 7
    for error in errors:
        assert error.startswith("llava_cot_kernels needs its compiled extension, which could not be imported (")
        assert error.endswith(f"): {HOW}")

    code, out, err = json.loads(command)
    assert code == 2 and out == ""
    assert err.startswith("error: llava_cot_kernels needs its compiled extension, which could not be imported (")
    assert err.endswith(f"): {HOW}\n") and err.count("\n") == 1


def test_the_error_says_why_a_built_extension_does_not_load(tmp_path):
    """For instance after torch was replaced: here the file is no library at all."""
    shutil.copytree(PACKAGE, tmp_path / PACKAGE.name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (tmp_path / PACKAGE.name / f"_C{EXTENSION_SUFFIXES[0]}").write_bytes(b"not a library")
    code = (
        "import llava_cot_kernels\ntry:\n    llava_cot_kernels.sample\nexcept ImportError as error:\n    print(error)"
    )
    message = run(code, cwd=tmp_path).strip()
    assert str(tmp_path) in message and message.endswith(HOW), message
