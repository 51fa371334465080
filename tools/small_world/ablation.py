"""What each stage is worth, at small scale: ``python -m tools.small_world.ablation OUT --base FOLDER``.

From one base, a fine-tune for each variant of ``llava_cot.data.variants`` and each seed, on the same questions and for
the same number of steps; then all answer the same held-out questions of the shapes world greedily. What ``OUT`` has
already is not made again, so the same command goes on where it was stopped. ``benchmarks/ablation_report.py`` makes the
table of ``OUT/ablation.json``.
"""

import argparse
import json
import platform
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from llava_cot.atomic import replacing
from llava_cot.checkpoint import checkpoint_sha256
from llava_cot.data import shapes
from llava_cot.data.variants import VARIANTS, convert
from llava_cot.data.world import write_world
from llava_cot.generator import SwiresGenerator
from llava_cot.stages import STAGES, Outcome, parse
from llava_cot.train.config import load_config

FIRST_SEED = 400_000  # of what is trained on: behind the samples of the base, the bundled model and its verifier
LAST_SEED = 700_000  # where those begin that calibrate
BASE = "base"  # the model before its fine-tunes, among the variants
QUESTIONS_AT_ONCE = 100
MAX_NEW_TOKENS = 200
OPENED = re.compile("|".join(stage.open_tag for stage in STAGES))


@dataclass(frozen=True)
class Setting:
    """What all fine-tunes of an ablation have in common.

    Raises:
        ValueError: steps < 1, or one of the questions is trained on.
    """

    base: str  # folder of the model from which all start
    base_sha256: str
    config: str  # YAML file of a fine-tune
    overrides: tuple[str, ...]  # of it
    training: dict[str, Any]  # what both say
    steps: int
    first_question: int  # seed of the first sample that is answered
    questions: int

    @classmethod
    def load(cls, base: Path | str, config: Path | str, overrides: Sequence[str] = (), **rest: int) -> "Setting":
        """Read the configuration and see which model it is; ``rest`` are steps, first_question and questions."""
        if (sha256 := checkpoint_sha256(base)) is None:
            raise ValueError(f"base must be a folder with a model, got {str(base)!r}")
        training = load_config(config, list(overrides)).model_dump(mode="json")
        return cls(str(base), sha256, str(config), tuple(overrides), training, **rest)

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be >= 1, got {self.steps}")
        if self.questions < 1:
            raise ValueError(f"questions must be >= 1, got {self.questions}")
        if self.first_question < LAST_SEED:
            raise ValueError(f"first_question must be >= {LAST_SEED}, got {self.first_question}")

    def training_seeds(self, seed: int) -> range:
        """The samples that are trained on under a seed: each once, and none under two seeds."""
        count = self.steps * self.training["batch_size"]
        start = FIRST_SEED + seed * count
        if seed < 0 or start + count > LAST_SEED:
            raise ValueError(f"seed must be in [0, {(LAST_SEED - FIRST_SEED) // count}), got {seed}")
        return range(start, start + count)


def fine_tune(setting: Setting, out: Path, variant: str, seed: int) -> Path:
    """Train a model in ``out / "VARIANT-SEED"`` by ``llava-cot train``, unless it is there; returns its folder.

    ``out`` has the training data of the seed, ``world-SEED``. Rows that a variant adds come on top: each step has the
    same questions in every variant, and here their captions too.
    """
    run = out / f"{variant}-{seed}".replace(" ", "-")
    if not (run / "model" / "training.json").is_file():  # which is written last
        world, data = out / f"world-{seed}", run / "train.jsonl"
        run.mkdir(parents=True, exist_ok=True)
        rows_per_question = convert(world / "train.jsonl", data, variant) // len(setting.training_seeds(seed))
        settings = {"model": setting.base, "data": data, "images": world, "output": run, "seed": seed, "epochs": 1}
        settings["batch_size"] = setting.training["batch_size"] * rows_per_question
        overrides = [*setting.overrides, *(f"{name}={value}" for name, value in settings.items())]
        with open(run / "log.txt", "w", encoding="utf-8") as log:
            command = [sys.executable, "-m", "llava_cot.cli", "train", setting.config, *overrides]
            done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT)
        if done.returncode:
            raise RuntimeError(f"training {variant!r} with seed {seed} ended with {done.returncode}, see {log.name}")
    return run / "model"


def evaluate(model: Path, seeds: Sequence[int]) -> dict[str, Any]:
    """Greedy answers to the samples of these seeds.

    ``right``: a 0 or 1 each; ``tokens``: generated for a question, on average; ``orders``: how many answers opened
    which stages in which order; ``texts``: the first three.
    """
    generator = SwiresGenerator.from_pretrained(model)
    texts: list[str] = []
    right, tokens = "", 0
    for start in range(0, len(seeds), QUESTIONS_AT_ONCE):
        samples = [shapes.sample(seed) for seed in seeds[start : start + QUESTIONS_AT_ONCE]]
        images, questions = [s.image for s in samples], [s.question for s in samples]
        answers = generator.answer_batch(images, questions, "greedy", max_new_tokens=MAX_NEW_TOKENS)
        right += "".join(str(int(shapes.is_correct(s, said(a.text)))) for s, a in zip(samples, answers))
        tokens += sum(a.usage.generated_tokens for a in answers)
        texts += [a.text for a in answers]
    orders = Counter(" ".join(tag[1:-1] for tag in OPENED.findall(text)) for text in texts)
    return {"right": right, "tokens": tokens / len(seeds), "orders": dict(orders.most_common()), "texts": texts[:3]}


def said(text: str) -> str:
    """The answer in a text: the text of its CONCLUSION, or without one the last paragraph."""
    conclusion = parse(text)["CONCLUSION"]
    return text.strip().split("\n\n")[-1] if conclusion.outcome == Outcome.MISSING else conclusion.text


def run(setting: Setting, out: Path, variants: Sequence[str], seeds: Sequence[int], processes: int = 1) -> Path:
    """All fine-tunes and evaluations, ``processes`` of them at a time; returns the file with their results.

    Raises:
        ValueError: an unknown variant, or ``out`` has runs of another setting. RuntimeError: a training failed.
    """
    if unknown := [variant for variant in variants if variant not in VARIANTS]:
        raise ValueError(f"variants must be of {list(VARIANTS)}, got {unknown}")
    worlds = {out / f"world-{seed}": setting.training_seeds(seed) for seed in seeds}
    _claim(out, setting)
    for world, samples in worlds.items():
        if not (world / "train.jsonl").is_file():
            write_world(world, samples)
    runs = {(variant, seed): _results(out, variant, seed) for seed in seeds for variant in variants}
    runs[BASE, 0] = _results(out, BASE, 0)
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        todo = [run for run, file in runs.items() if not file.is_file()]
        pending = [pool.submit(_run_one, setting, out, *run) for run in todo]
        try:
            for future in as_completed(pending):
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)  # those that run end, and are kept
            raise
    rows: dict[str, dict[str, Any]] = {}
    for (variant, seed), file in sorted(runs.items(), key=lambda run: [BASE, *variants].index(run[0][0])):
        rows.setdefault(variant, {})[str(seed)] = json.loads(file.read_text(encoding="utf-8"))
    with replacing(out / "ablation.json") as opened:
        json.dump({"machine": _machine(), "setting": asdict(setting), "rows": rows}, opened)
    return out / "ablation.json"


def _claim(out: Path, setting: Setting) -> None:
    """Keep ``out`` for this setting."""
    file, described = out / "setting.json", json.dumps(asdict(setting), indent=1)
    if not file.is_file():
        out.mkdir(parents=True, exist_ok=True)
        with replacing(file) as opened:
            opened.write(described)
    if file.read_text(encoding="utf-8") != described:
        raise ValueError(f"out must be new or have the same setting as {str(file)!r}, got another")


def _results(out: Path, variant: str, seed: int) -> Path:
    return out / f"{variant}-{seed}.json".replace(" ", "-")


def _run_one(setting: Setting, out: Path, variant: str, seed: int) -> None:
    """Train and evaluate a variant under a seed; what ``evaluate`` says stands in its file."""
    torch.set_num_threads(1)
    model = Path(setting.base) if variant == BASE else fine_tune(setting, out, variant, seed)
    found = evaluate(model, range(setting.first_question, setting.first_question + setting.questions))
    with replacing(_results(out, variant, seed)) as opened:
        json.dump(found, opened)
    print(f"{variant}, seed {seed}: {found['right'].count('1') / setting.questions:.1%}", flush=True)


def _machine() -> str:
    return f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}; torch {torch.__version__}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for data, models and results")
    parser.add_argument("overrides", nargs="*", help="settings of the fine-tunes that differ: optimizer.lr=1e-3 ...")
    parser.add_argument("--base", type=Path, required=True, help="the model from which all start")
    parser.add_argument("--config", type=Path, default=Path("configs/ablation.yaml"), help="of a fine-tune")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=600, help="of each fine-tune")
    parser.add_argument("--questions", type=int, default=2000)
    parser.add_argument("--first-question", type=int, default=shapes.TEST_SEEDS.start, help="its seed")
    parser.add_argument("--processes", type=int, default=2, help="one core each")
    args = parser.parse_args()
    try:
        numbers = {"steps": args.steps, "first_question": args.first_question, "questions": args.questions}
        setting = Setting.load(args.base, args.config, args.overrides, **numbers)
        print(run(setting, args.out, args.variants, args.seeds, args.processes))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
