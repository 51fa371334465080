"""Measure how often each search is right, by scorer and by generated tokens: the paper's comparison at small scale.

``python benchmarks/bench_accuracy.py`` takes two cores and less than an hour. It writes build/accuracy.json. Then
``python benchmarks/accuracy_report.py build/accuracy.json`` makes the results, the tables and the plot.

The tiny model answers held-out questions of the shapes world. One pool of 16 sampled answers per question serves every
vote and every best-of-N. Searches by stages run with several scorers: the two that choose best from the pool of the
calibration questions, ``by_stage``, the reward model of ``configs/tiny_reward.yaml`` if build/ has it, and oracles.
``--sweep`` compares temperatures on the calibration questions. ``--model tiny-qwen`` asks the second bundled model in
fewer searches: greedy, the best of up to 6, the stage beam and SWIRES. They are scored by the tiny model's verifier as
it is, which was trained on that model's answers. These are scale models: nothing here says how good the 11B model is.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from llava_cot import SwiresGenerator, tiny_path
from llava_cot.bundled import BUNDLED
from llava_cot.checkpoint import checkpoint_sha256
from llava_cot.core import SamplingParams
from llava_cot.data import shapes
from llava_cot.scoring import SCORERS, Calibration, JudgeScorer, Scorer
from llava_cot.scoring.verifier import load_verifier
from llava_cot.stages import parse
from tools.small_world.scorers import Oracle, World, load_reward_model

POOL = 16
SECOND_POOL = 6  # takes more tokens than SWIRES
FREE = ("confidence", "lowest_group", "tail", "negative_entropy", "self_certainty")
NOISES = (0.5, 1.0, 2.0)
CALIBRATION_SEEDS = range(700_000, 700_400)
SAMPLING = {"temperature": 1.0, "top_p": 1.0}
SWEEP = ((0.6, 0.9), (0.8, 1.0), (1.0, 1.0), (1.2, 1.0))
MAX_NEW_TOKENS = 200
QUESTIONS_AT_ONCE = 100
REWARD = Path("build/tiny_reward/model")
# A verifier's cutoff is a logit. An oracle's is between right and wrong. The others are calibrated quantiles.
CUTOFFS = {"verifier": 0.0, "reward model": 0.0}
STAGES = ("SUMMARY", "CAPTION", "REASONING", "CONCLUSION")
PUBLISHED = {"candidates": dict(zip(STAGES, (1, 4, 4, 1))), "keep": 2}
# This policy makes its mistakes in the reasoning: an exact caption hardly makes a right answer more likely. So
# candidates are drawn there. This was chosen on the calibration questions.
REASONING = {"candidates": dict(zip(STAGES, (1, 1, 4, 1))), "retrace": {"REASONING": "REASONING"}, "max_rounds": 3}

# name -> (search, settings); the searches of the second need a scorer
PLAIN: dict[str, tuple[str, dict[str, Any]]] = {
    "greedy": ("greedy", {}),
    **{f"token beam of {k}": ("token_beam", {"num_beams": k}) for k in (2, 4, 8)},
}
SCORED: dict[str, tuple[str, dict[str, Any]]] = {
    "sentence beam": ("sentence_beam", {}),
    "stage beam": ("stage_beam", PUBLISHED),
    "SWIRES, published": ("swires", {**PUBLISHED, "retrace": {"REASONING": "CAPTION"}, "pass_rank": 2}),
    "SWIRES, reasoning": ("swires", REASONING),
}
WITH_ORACLES = ("stage beam", "SWIRES, published", "SWIRES, reasoning")
OF_SECOND = ("greedy", "stage beam", "SWIRES, published")


def scorers_of(generator: SwiresGenerator, world: World) -> dict[str, Scorer]:
    """Return every scorer that scores one candidate at a time, by name."""
    found = {name: SCORERS[name] for name in FREE} | {"judge_yes_no": JudgeScorer(generator.processor)}
    found |= {oracle.__name__: oracle for oracle in (Oracle(world), *(Oracle(world, noise) for noise in NOISES))}
    if REWARD.is_dir():
        found["reward model"] = load_reward_model(REWARD)
    return found | {"verifier": load_verifier(world.clean_view)}


def ask(generator: SwiresGenerator, world: World, search: Any, **settings) -> list:
    """Return the answers to all questions of the world, which are asked in groups."""
    answers = []
    for start in range(0, len(world.samples), QUESTIONS_AT_ONCE):
        some = world.samples[start : start + QUESTIONS_AT_ONCE]
        images, questions = [s.image for s in some], [s.question for s in some]
        answers += generator.answer_batch(images, questions, search, max_new_tokens=MAX_NEW_TOKENS, **settings)
    return answers


def sample_pool(
    seeds: Sequence[int],
    sampling: dict[str, float],
    names: Sequence[str] | None = None,
    model: str = "tiny",
    count: int = POOL,
) -> list[list[dict[str, Any]]]:
    """Return, for each question, ``count`` sampled answers with their scores by every scorer or by those named."""
    generator, world = SwiresGenerator.from_pretrained(model), World(seeds)
    scorers = {name: scorer for name, scorer in scorers_of(generator, world).items() if names is None or name in names}

    def policy(search):
        nodes = yield from search.expand([search.root], count, None, params=SamplingParams(**sampling))
        found: list[dict[str, float]] = [{} for _ in nodes]
        for name, scorer in scorers.items():
            yield from search.score(nodes, scorer)
            for node, scores in zip(nodes, found):
                scores[name] = node.score
        for node, scores in zip(nodes, found):
            node.notes = scores
        return search.best(nodes)

    return [
        [
            {
                "text": node["text"],
                "tokens": len(node["tokens"]),
                "closed": node["closed"],
                "right": shapes.is_correct(sample, parse(node["text"])["CONCLUSION"].text),
                "scores": node["notes"],
            }
            for node in answer.trace.data["nodes"]
        ]
        for sample, answer in zip(world.samples, ask(generator, world, policy))
    ]


def run_search(
    seeds: Sequence[int],
    model: str,
    search: str,
    settings: dict[str, Any],
    scorer: str | None,
    calibration: Calibration | None,
) -> list[dict[str, Any]]:
    """Return, for each question, whether the answer was right and what it cost."""
    generator, world = SwiresGenerator.from_pretrained(model), World(seeds)
    if scorer is not None:
        settings = {**settings, **SAMPLING, "scorer": {**SCORERS, **scorers_of(generator, world)}[scorer]}
    if calibration is not None:
        generator.calibrations[calibration.scorer] = calibration
    elif search == "swires":
        settings["cutoff"] = CUTOFFS.get(scorer or "", 0.5)
    answers = ask(generator, world, search, **settings)
    return [
        {
            "right": shapes.is_correct(sample, answer.conclusion),
            "tokens": answer.usage.generated_tokens,
            "scorer_calls": answer.usage.scorer_calls,
            "prompt_tokens": answer.usage.prompt_tokens,
            "retraces": len(answer.trace.events("retraced")),
        }
        for sample, answer in zip(world.samples, answers)
    ]


def calibrate(seeds: Sequence[int], scorer: str) -> list[Calibration]:
    generator, world = SwiresGenerator.from_pretrained("tiny"), World(seeds)
    scorer_of = {**SCORERS, **scorers_of(generator, world)}[scorer]
    images, questions = [s.image for s in world.samples], [s.question for s in world.samples]
    data = f"shapes world, seeds {seeds[0]} to {seeds[-1]}"
    settings = {"scorer": scorer_of, "max_new_tokens": MAX_NEW_TOKENS, **SAMPLING}
    return [generator.calibrate(images, questions, data=data, **settings)]


def in_parts(processes: int, function: Callable[..., list], seeds: Sequence[int], *arguments: Any) -> list:
    """Run ``function(seeds, *arguments)`` on equal parts, each on its own core, and join the results in order."""
    size = -(-len(seeds) // processes)
    with ProcessPoolExecutor(processes, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        parts = [pool.submit(function, seeds[at : at + size], *arguments) for at in range(0, len(seeds), size)]
        return [item for part in parts for item in part.result()]


def best_of(answers: list[dict[str, Any]], scorer: str) -> dict[str, Any]:
    """Return the best answer among those that ended; the first one wins ties."""
    return max(answers, key=lambda answer: (answer["closed"], answer["scores"][scorer]))


def choose_scorers(pool: list[list[dict[str, Any]]]) -> list[str]:
    """Return the scorers to search with: the best two of a pool without oracles, the reward model, and by_stage."""
    names = [name for name in pool[0][0]["scores"] if not name.startswith("oracle")]
    right = {name: sum(best_of(answers, name)["right"] for answers in pool) for name in names}
    print("best of 16 on calibration questions:", {name: f"{n / len(pool):.1%}" for name, n in right.items()})
    best = sorted(names, key=lambda name: -right[name])[:2]
    return [*best, *({"reward model"} & set(names) - set(best)), "by_stage"]


def sweep(processes: int) -> None:
    """Compare temperatures on 200 of the calibration questions."""
    print("| temperature | top_p | one sample | any of 16 right | distinct answers | best of 16 by the verifier |")
    print("| --- | --- | --- | --- | --- | --- |")
    for temperature, top_p in SWEEP:
        sampling = {"temperature": temperature, "top_p": top_p}
        pool = in_parts(processes, sample_pool, CALIBRATION_SEEDS[:200], sampling, ("confidence", "verifier"))
        one = sum(answers[0]["right"] for answers in pool) / len(pool)
        oracle = sum(any(a["right"] for a in answers) for answers in pool) / len(pool)
        distinct = sum(len({a["text"] for a in answers}) for answers in pool) / len(pool) / POOL
        verified = sum(best_of(answers, "verifier")["right"] for answers in pool) / len(pool)
        print(f"| {temperature} | {top_p} | {one:.1%} | {oracle:.1%} | {distinct:.1%} | {verified:.1%} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=2000)
    parser.add_argument("--first-seed", type=int, default=shapes.TEST_SEEDS.start)
    parser.add_argument("--model", default="tiny", choices=BUNDLED)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--sweep", action="store_true", help="compare temperatures on calibration questions and stop")
    parser.add_argument("--out", type=Path, default=Path("build/accuracy.json"))
    args = parser.parse_args()
    if args.sweep:
        return sweep(args.processes)
    start, run, second = time.monotonic(), partial(in_parts, args.processes), args.model != "tiny"
    seeds = range(args.first_seed, args.first_seed + args.questions)

    def log(what, rows):
        right = sum(row["right"] for row in rows) / len(rows)
        tokens = sum(row["tokens"] for row in rows) / len(rows)
        print(f"{(time.monotonic() - start) / 60:5.1f} min  {what}: {right:.1%}, {tokens:.0f} tokens", flush=True)

    scorers, oracles = ["verifier"], []
    if not second:
        scorers = choose_scorers(run(sample_pool, CALIBRATION_SEEDS, SAMPLING))
        oracles = ["oracle, noise 0.5", "oracle, noise 1"]
    calibrations = {name: calibrate(CALIBRATION_SEEDS, name)[0] for name in scorers if name not in CUTOFFS}
    names, count = (("confidence", "verifier"), SECOND_POOL) if second else (None, POOL)
    pool = run(sample_pool, seeds, SAMPLING, names, args.model, count)
    log(f"pool of {count}, the first of each", [answers[0] for answers in pool])
    searches = {}
    for name, (search, settings) in PLAIN.items():
        if not second or name in OF_SECOND:
            searches[name] = run(run_search, seeds, args.model, search, settings, None, None)
            log(name, searches[name])
    for scorer in (*scorers, *oracles):
        for name, (search, settings) in SCORED.items():
            if name not in (OF_SECOND if second else WITH_ORACLES if scorer in oracles else SCORED):
                continue
            place, calibration = f"{name}, {scorer}", calibrations.get(scorer)
            searches[place] = run(run_search, seeds, args.model, search, settings, scorer, calibration)
            log(place, searches[place])
    data = {
        "model": args.model,
        "model_sha256": checkpoint_sha256(BUNDLED[args.model]()),
        "verifier_sha256": checkpoint_sha256(tiny_path() / "verifier"),
        "reward_sha256": None if second else checkpoint_sha256(REWARD),
        "seeds": [seeds[0], seeds[-1]],
        "calibration_seeds": [CALIBRATION_SEEDS[0], CALIBRATION_SEEDS[-1]],
        "sampling": SAMPLING,
        "minutes": round((time.monotonic() - start) / 60, 1),
        "scorers": scorers,
        "calibrations": {name: asdict(calibration) for name, calibration in calibrations.items()},
        "searches": {name: {key: [row[key] for row in rows] for key in rows[0]} for name, rows in searches.items()},
        "pool": [
            {key: [a[key] for a in answers] for key in ("text", "tokens", "closed", "right")}
            | {"scores": {name: [round(a["scores"][name], 4) for a in answers] for name in answers[0]["scores"]}}
            for answers in pool
        ],
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(data) + "\n")


if __name__ == "__main__":
    main()
