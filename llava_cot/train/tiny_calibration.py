"""Calibrate the tiny model's cutoffs: ``python -m llava_cot.train.tiny_calibration FOLDER``.

On 400 samples that it was neither trained nor is tested on.
"""

import argparse
from pathlib import Path

import torch

from llava_cot.data import shapes
from llava_cot.generator import CALIBRATION_FILE, SwiresGenerator

SEEDS = range(700_000, 700_400)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="the model's folder; the calibration is written beside it")
    folder = parser.parse_args().folder
    torch.set_num_threads(1)
    generator = SwiresGenerator.from_pretrained(folder)
    samples = [shapes.sample(seed) for seed in SEEDS]
    calibration = generator.calibrate(
        [s.image for s in samples],
        [s.question for s in samples],
        data=f"shapes world, seeds {SEEDS[0]} to {SEEDS[-1]}",
        max_new_tokens=256,
    )
    calibration.save(folder / CALIBRATION_FILE)


if __name__ == "__main__":
    main()
