"""VLMEvalKit's own run.py with our model, from a TSV to its file of scores, beside our own run on the same TSV.

It needs a VLMEvalKit with all that it imports, such as ms-vlmeval 0.0.20 with its dependencies.
"""

import base64
import csv
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import vlmevalkit_launcher
from helpers.benchmark_files import write_tsv

from llava_cot.data import shapes
from llava_cot.evaluate.benchmarks import open_benchmark
from llava_cot.evaluate.command import Request, evaluate_benchmark
from llava_cot.evaluate.export import write_vlmevalkit_table
from llava_cot.evaluate.folder import read_run

MODEL = "llava-cot-greedy"
OTHERS = ("yes", "no", "1", "2", "3", "4", "red", "blue")


def shapes_row(number):
    """A question of the world with four options in VLMEvalKit's columns."""
    sample, image = shapes.sample(800_000 + number), io.BytesIO()
    sample.image.save(image, "PNG")
    wrong = [other for other in OTHERS if other != sample.answer][number % 4 : number % 4 + 3]
    options = sorted([sample.answer, *wrong])
    row = {"index": number, "question": sample.question, **dict(zip("ABCD", options))}
    answer = "ABCD"[options.index(sample.answer)]
    return row | {"answer": answer, "category": "shapes", "image": base64.b64encode(image.getvalue()).decode()}


def run_vlmevalkit(folder, *arguments):
    """Run the launcher there, and return VLMEvalKit's score."""
    own = "--pretrained tiny --search greedy --load device=cpu --set max_new_tokens=160"
    others = "--data Shapes --judge exact_matching"
    command = [sys.executable, vlmevalkit_launcher.__file__, *own.split(), *others.split(), *arguments]
    paths = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"LMUData": str(folder), "PRED_FORMAT": "tsv", "PYTHONPATH": paths}
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    last = (done.stderr.strip().splitlines() or [""])[-1]
    if done.returncode and last.startswith("ModuleNotFoundError"):
        pytest.skip(f"VLMEvalKit's run.py needs all of its dependencies: {last}")
    assert done.returncode == 0, done.stderr
    (scores,) = read_table(folder / "outputs" / MODEL / f"{MODEL}_Shapes_acc.csv", ",")
    return float(scores["Overall"])


def read_table(path, delimiter):
    with open(path, encoding="utf-8", newline="") as file:
        return [*csv.DictReader(file, delimiter=delimiter)]


def test_vlmevalkit_asks_and_scores_as_we_do(tmp_path):
    pytest.importorskip("tabulate", reason="VLMEvalKit's run.py needs its dependencies: pip install ms-vlmeval==0.0.20")
    data = tmp_path / "Shapes.tsv"
    write_tsv(data, [shapes_row(number) for number in range(12)])
    score = run_vlmevalkit(tmp_path)
    table = read_table(tmp_path / "outputs" / MODEL / f"{MODEL}_Shapes.tsv", "\t")
    request = Request(
        benchmark="custom", data=data, out=tmp_path / "run", preset="vlmevalkit", rules="compat", max_new_tokens=160,
        traces="none",
    )  # fmt: skip
    summary = evaluate_benchmark(request)
    results = read_run(tmp_path / "run").results
    assert {row["index"]: row["prediction"] for row in table} == {each.id: each.conclusion for each in results}
    assert score == pytest.approx(summary["accuracy"])
    # The same answers as a table of ours, which VLMEvalKit takes for that of an earlier run.
    shutil.rmtree(tmp_path / "outputs")
    out = tmp_path / "outputs" / MODEL / "T20260101-000000" / f"{MODEL}_Shapes.tsv"
    write_vlmevalkit_table(open_benchmark("custom", data), results, out)
    assert run_vlmevalkit(tmp_path, "--mode", "eval") == score
