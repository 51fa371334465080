"""``.ci/gpu``: no part ends another, whatever befalls it, and the table at the end says what befell whom."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# What stands in for python3 says how each part ends; only the script itself is under test.
PYTHON = r"""#!/usr/bin/env bash
case "$*" in
  *llava_cot_kernels.info*) echo "built" ;;
  *bench_floor*) python() { "$REAL" "$@"; }; python -c "raise ValueError('a benchmark that raises')" ;;
  *bench_decode*--compile*) echo "hanging"; sleep 300 & wait ;;
  *decode.json) echo '{"rows": [1]}' > "${@: -1}"; echo "a row"; kill -9 $$ ;;
  *test_sanitise* | *test_sampling_op*) echo "1 passed" ;;
  *-m\ pytest*) echo "1 failed, 2 passed"; exit 1 ;;
  *bench_sampling*) echo "bench_sampling.py needs a GPU: there is none"; echo "a warning"; exit 77 ;;
  *) echo "fine" ;;
esac
"""
SANITIZER = '#!/usr/bin/env bash\nwhile [[ $1 != python3 ]]; do shift; done\nexec "$@"\n'


@pytest.fixture
def call(tmp_path):
    for name, text in (("python3", PYTHON), ("compute-sanitizer", SANITIZER)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    def run(*arguments: str) -> subprocess.CompletedProcess:
        path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, "REAL": sys.executable, "GPU_PART_SECONDS": "5"}
        command = ["bash", str(ROOT / ".ci/gpu"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)

    return run


def test_every_part_reports_whatever_befalls_another(call, tmp_path):
    found = call("out", "first")
    assert found.returncode == 1
    lines = [line.split(None, 3) for line in (tmp_path / "out/summary.txt").read_text().splitlines()]
    expected = {
        "build": "ok: built",
        "floor": "FAILED, exit code 1: ValueError: a benchmark that raises",
        "decode": "killed: a row",
        "tests": "FAILED, exit code 1: 1 failed, 2 passed",
        "compiled": "stopped at its limit: hanging",
        "sampling": "no GPU: bench_sampling.py needs a GPU: there is none",
        "attention": "ok: fine",
        "memcheck": "ok: 1 passed",
    }
    assert {name: result for name, _, _, result in lines} == expected
    assert found.stdout.rstrip().endswith((tmp_path / "out/summary.txt").read_text().rstrip())  # the table comes last
    assert (tmp_path / "out/decode.json").read_text() == '{"rows": [1]}\n'  # what the killed part had written
    log = (tmp_path / "out/log.txt").read_text()
    assert "Traceback" in log and log.count("\n==== ") == len(expected)
    assert len(list((tmp_path / "out").iterdir())) <= 8 and len(found.stdout) < 12_000


def test_the_second_call_has_few_files_too(call, tmp_path):
    found = call("out", "second")
    assert found.returncode == 0 and "train" in found.stdout
    names = set((ROOT / ".ci/gpu").read_text().split("second()")[1].split("\n}")[0].split())
    assert len({name for name in names if name.startswith('"$out/')}) + 2 <= 8


@pytest.mark.parametrize("arguments", [[], ["out"], ["out", "third"], ["out", "first", "more"]])
def test_wrong_arguments_are_refused(call, tmp_path, arguments):
    found = call(*arguments)
    assert (found.returncode, found.stderr) == (2, "usage: .ci/gpu FOLDER first|second\n")
    assert not (tmp_path / "out").exists()
