"""Fast stage-level search for vision-language models that reason in stages."""

from llava_cot.answer import Answer, Finished
from llava_cot.generator import SwiresGenerator
from llava_cot.scoring import Calibration
from llava_cot.search import (
    BestOfNConfig,
    GreedyConfig,
    MajorityConfig,
    SampleConfig,
    StageBeamConfig,
    SwiresConfig,
    TokenBeamConfig,
)
from llava_cot.stages import STAGES, Stage
from llava_cot.tiny import tiny_path

__all__ = [
    "STAGES",
    "Answer",
    "BestOfNConfig",
    "Calibration",
    "Finished",
    "GreedyConfig",
    "MajorityConfig",
    "SampleConfig",
    "Stage",
    "StageBeamConfig",
    "SwiresConfig",
    "SwiresGenerator",
    "TokenBeamConfig",
    "tiny_path",
]
