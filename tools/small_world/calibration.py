"""Calibrate the tiny model's cutoffs for every scorer: ``python -m tools.small_world.calibration FOLDER``.

On 400 samples that it was neither trained nor is tested on. If there is a verifier in ``FOLDER/verifier``, it is one of
the scorers.
"""

import argparse
from pathlib import Path

import torch

from llava_cot.generator import CALIBRATION_FILE, SwiresGenerator
from llava_cot.scoring import SCORERS
from llava_cot.scoring.verifier import load_verifier
from tools.small_world.scorers import World

SEEDS = range(700_000, 700_400)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the model's folder; the calibrations are written beside it")
    folder = parser.parse_args().folder
    torch.set_num_threads(1)
    (folder / CALIBRATION_FILE).unlink(missing_ok=True)  # it may be of other weights
    generator, world = SwiresGenerator.from_pretrained(folder), World(SEEDS)
    scorers = dict(SCORERS)
    if (folder / "verifier").is_dir():
        scorers["verifier"] = load_verifier(world.clean_view, folder)
    for name, scorer in scorers.items():
        calibration = generator.calibrate(
            [sample.image for sample in world.samples],
            [sample.question for sample in world.samples],
            data=f"shapes world, seeds {SEEDS[0]} to {SEEDS[-1]}",
            scorer=scorer,
            max_new_tokens=256,
        )
        calibration.save(folder / CALIBRATION_FILE)
        print(f"{name}: { ({stage: calibration.cutoff(stage, 0.6) for stage in calibration.quantiles}) }", flush=True)


if __name__ == "__main__":
    main()
