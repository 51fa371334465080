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
    other = Calibration.fit("tail", "noise", {"CAPTION": [1.0, 2.0]}, model="abc")
    for one in (Calibration.fit("confidence", "older", {"CAPTION": [0.0]}), other, calibration):
        one.save(tmp_path / "c.json")
    assert Calibration.load_all(tmp_path / "c.json") == [other, calibration]
    assert [path.name for path in tmp_path.iterdir()] == ["c.json"]
    (tmp_path / "d.json").write_text('{"scorer": "tail"}')
    with pytest.raises(ValueError, match="path must be a file of calibrations"):
        Calibration.load_all(tmp_path / "d.json")


def test_the_other_scales():
    calibration = Calibration.fit("confidence", "noise", {"CAPTION": SCORES.tolist()})
    assert calibration.z_cutoff("CAPTION", 0.2533) == pytest.approx(SCORES.mean() + 0.2533 * SCORES.std(), abs=0.05)
    for score in (-9.0, -1.0, 0.0, 0.3, 9.0):
        assert calibration.quantile("CAPTION", score) == pytest.approx((score > SCORES).mean(), abs=0.01)
    flat = Calibration.fit("vote", "noise", {"CAPTION": [0.0] * 50 + [1.0] * 50})
    assert flat.quantile("CAPTION", 1.0) == pytest.approx(0.75, abs=0.02)  # ties count half


@pytest.mark.parametrize("cutoff, retraces", [(None, 1), (0.2, 0)])
def test_swires_takes_its_cutoff_from_it_unless_it_has_its_own(cutoff, retraces):
    calibration = Calibration.fit("any", "0 to 1", {"REASONING": [0.0, 1.0]})

    def script(stage, round, parent, index):
        return Draft(score=0.59 if round == 1 else 0.61)  # the 60 % quantile lies between

    played = play(
        swires, lambda scorer: SwiresConfig.published(scorer=scorer, cutoff=cutoff), script, calibration=calibration
    )
    assert len(played.search.retraces) == retraces
