"""Calibration: a threshold is a quantile of measured scores."""

import math

import numpy as np
import pytest
from helpers.scripted import Draft, play

from llava_cot.scoring import Calibration
from llava_cot.search import SwiresConfig
from llava_cot.search.swires import swires

SCORES = np.random.default_rng(0).normal(size=1000)


@pytest.mark.parametrize("quantile", [0.0, 0.1, 0.6, 0.655, 1.0])
def test_a_cutoff_is_a_quantile(quantile):
    calibration = Calibration.fit("confidence", "noise", {"CAPTION": SCORES.tolist()})
    assert calibration.cutoff("CAPTION", quantile) == pytest.approx(np.quantile(SCORES, quantile), abs=0.01)


def test_scores_that_are_none_do_not_count():
    scores = {"CAPTION": [1.0, math.nan, 3.0, -math.inf], "REASONING": [math.nan], "CONCLUSION": []}
    calibration = Calibration.fit("confidence", "noise", scores)
    assert calibration.cutoff("CAPTION", 0.0) == 1.0 and calibration.cutoff("CAPTION", 0.5) == 2.0
    for stage in ("SUMMARY", "REASONING", "CONCLUSION"):
        with pytest.raises(ValueError, match=f"calibration on 'noise' must have scores of stage {stage}, got none"):
            calibration.cutoff(stage, 0.5)


def test_saved_and_loaded(tmp_path):
    calibration = Calibration.fit("confidence", "noise", {"CAPTION": SCORES.tolist()})
    calibration.save(tmp_path / "c.json")
    assert Calibration.load(tmp_path / "c.json") == calibration


@pytest.mark.parametrize("cutoff, retraces", [(None, 1), (0.2, 0)])
def test_swires_takes_its_cutoff_from_it_unless_it_has_its_own(cutoff, retraces):
    calibration = Calibration.fit("any", "0 to 1", {"REASONING": [0.0, 1.0]})

    def script(stage, round, parent, index):
        return Draft(score=0.59 if round == 1 else 0.61)  # the 60 % quantile lies between

    played = play(
        swires, lambda scorer: SwiresConfig.published(scorer=scorer, cutoff=cutoff), script, calibration=calibration
    )
    assert len(played.search.retraces) == retraces
