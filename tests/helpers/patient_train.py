"""``python -m helpers.patient_train CONFIG ...``: ``llava-cot train`` that waits for SIGTERM after its first step."""

import sys
import time
from contextlib import contextmanager

from llava_cot import cli
from llava_cot.train import trainer

stop_requested, steps = trainer.stop_requested, trainer.Loader.steps
told = []


@contextmanager
def noted():
    with stop_requested() as stop:
        told.append(stop)
        yield stop


def patient(self, start, last):
    for batches in steps(self, start, last):
        yield batches
        while not told[0].is_set():
            time.sleep(0.01)


if __name__ == "__main__":
    trainer.stop_requested, trainer.Loader.steps = noted, patient
    sys.argv[1:1] = ["train"]
    cli.main()
