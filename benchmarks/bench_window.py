"""The host's share of a window of 4 steps: what Python does around them, for which a GPU waits between two windows.

``python benchmarks/bench_window.py`` lets candidates of the tiny model grow by windows on the CPU. The steps themselves
cost nothing: nothing is computed, and the host reads the same tokens every time. So the figures are those of the host
beside a GPU, without the calls of CUDA. They are the medians of many windows, in microseconds that the process has
computed for, on one thread, so that a busy machine matters little. The exit code is 1 if a window takes more than
0.3 ms with 16 candidates, or 1 ms with 64.

The parts are: "append", which takes pages for the steps; "launch", which fills the buffers of the steps and starts
them; "read", which notes the tokens that were drawn, and all else that the window does; and "schedule", the rest of the
engine's step.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_search import environment
from timing import Results

from llava_cot import EngineConfig, SwiresGenerator
from llava_cot.core import Expand, SamplingParams
from llava_cot.data import shapes
from llava_cot.engine.engine import Engine
from llava_cot.engine.graphs import Recorder, Step

STEPS = 4  # of a window
ROWS = ((1, 1), (4, 4), (16, 1), (4, 16), (64, 1))  # candidates of a question, questions
MOST = {16: 300, 64: 1000}  # us of a window, by candidates of all questions
PARTS = {"append": ("runner", "append"), "launch": ("window", "_launch"), "read": ("", "_window")}


class Idle(Recorder):
    """Steps that do nothing, so that the host always reads token 0."""

    def capture(self, step: Step) -> Step:
        return lambda: None


class Clocks:
    """The process time of the calls of some methods of an engine, in us."""

    def __init__(self, engine: Engine) -> None:
        self.spent = dict[str, float]()
        for part, (owner, method) in PARTS.items():
            of = getattr(engine, owner) if owner else engine
            setattr(of, method, self._timed(part, getattr(of, method)))

    def _timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            start = time.process_time_ns()
            try:
                return function(*args)
            finally:
                self.spent[part] = (time.process_time_ns() - start) / 1e3

        return timed


def bench(generator: SwiresGenerator, candidates: int, questions: int, windows: int) -> dict[str, Any]:
    config = EngineConfig(steps_per_look=STEPS, draft_tokens=0)
    engine = SwiresGenerator(generator.model, generator.processor, engine=config).engine
    sessions = []
    for seed in range(questions):
        sample = shapes.sample(808_000 + seed)
        sessions.append(engine.open(generator.prompt([sample.image], sample.question)))
        params, tokens = SamplingParams(temperature=1.0, top_p=0.95), STEPS * windows
        request = Expand(0, tuple(range(candidates)), params, tokens, stops=frozenset())
        sessions[-1].ask([request], lambda replies: None)
    engine.step()  # prefills and forks
    engine.window.captured.recorder = Idle()
    clocks, found = Clocks(engine), list[dict[str, float]]()
    while engine.has_work:
        clocks.spent.clear()
        start = time.process_time_ns()
        engine.step()
        whole = (time.process_time_ns() - start) / 1e3
        spent = clocks.spent
        if "launch" in spent:  # else the last step, which is none of a window
            append, launch, window = (spent[part] for part in PARTS)
            read = window - append - launch
            found.append({"append": append, "launch": launch, "read": read, "schedule": whole - window, "whole": whole})
    row: dict[str, Any] = {"candidates": candidates, "questions": questions, "windows": len(found)}
    row |= {part: round(statistics.median(each[part] for each in found), 1) for part in found[0]}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=100)
    parser.add_argument("--json", type=Path, help="write the figures as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    generator = SwiresGenerator.from_pretrained("tiny")
    results = Results(args.json, benchmark="bench_window", **environment(1, "cpu"), steps=STEPS)
    print("us of a window\n| questions | candidates of each | append | launch | read | schedule | whole |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    missed = list[str]()
    for candidates, questions in ROWS:
        row = bench(generator, candidates, questions, args.windows)
        results.add(row)
        cells = (row[part] for part in ("append", "launch", "read", "schedule", "whole"))
        print(f"| {questions} | {candidates} | " + " | ".join(f"{us:.0f}" for us in cells) + " |", flush=True)
        most = MOST.get(candidates * questions)
        if most is not None and row["whole"] > most:
            missed.append(f"target missed with {questions} x {candidates}: {row['whole']} us, not {most}")
    if missed:
        raise SystemExit("\n".join(missed))


if __name__ == "__main__":
    main()
