"""Every file of examples/ runs from any folder, and prints what it says it prints."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"
CALLS = {
    "own_policy.py": ["--questions", "2"],
    "own_scorer.py": ["--questions", "2", "--candidates", "2"],
    "batch_evaluation.py": ["--questions", "2", "--search", "stage_beam"],
}
PRINTED = {
    "own_policy.py": r"(\w[\w .]+[?.] \w+ \((right|wrong, the truth is \w+); \d+ endings\)\n){2}",
    "own_scorer.py": r"best of 2 by confidence: [0-2] of 2 right\nbest of 2 by counts_right: [0-2] of 2 right\n",
    "batch_evaluation.py": r"search: stage_beam, 2 questions, 0 failed\n"
    r"right: [0-2] of 2 = [\d.]+% \(95 % interval [\d.]+% to [\d.]+%\)\ngenerated tokens per question: \d+\n",
}


def test_every_example_is_run():
    assert sorted(CALLS) == sorted(path.name for path in EXAMPLES.glob("*.py"))


# Runs each file as the main program, one after the other; most of what each would take alone is to import torch.
ALL_IN_TURN = f"""
import runpy, sys
for name, arguments in {CALLS!r}.items():
    print("running", name)
    sys.argv = [name, *arguments]
    runpy.run_path({str(EXAMPLES)!r} + "/" + name, run_name="__main__")
"""


def test_examples_run(tmp_path):
    done = subprocess.run(
        [sys.executable, "-P", "-c", ALL_IN_TURN], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    for name, expected in PRINTED.items():
        printed = done.stdout.partition(f"running {name}\n")[2].partition("running ")[0]
        assert re.fullmatch(expected, printed), (name, done.stdout)
    assert not list(tmp_path.iterdir())


def test_the_notebook_runs_and_has_its_outputs(capsys):
    file = EXAMPLES / "trace.ipynb"
    assert file.stat().st_size < 300_000
    cells = [cell for cell in json.loads(file.read_text("utf-8"))["cells"] if cell["cell_type"] == "code"]
    names = {}
    for count, cell in enumerate(cells, 1):
        code = "".join(cell["source"])
        exec(compile(code, f"{file.name}, cell {cell['id']}", "exec"), names)
        ends_in_value = isinstance(ast.parse(code).body[-1], ast.Expr)  # which a notebook shows
        assert cell["execution_count"] == count
        assert bool(cell["outputs"]) == bool(capsys.readouterr().out or ends_in_value), code
        assert all(output["output_type"] != "error" for output in cell["outputs"]), code
