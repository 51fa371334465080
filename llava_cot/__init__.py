"""Fast stage-level search for vision-language models that reason in stages."""

from llava_cot.answer import Answer, Finished, SearchOutput
from llava_cot.engine.budget import Budget
from llava_cot.generator import SwiresGenerator
from llava_cot.scoring import Calibration
from llava_cot.search import (
    BestOfNConfig,
    GreedyConfig,
    MajorityConfig,
    SampleConfig,
    SentenceBeamConfig,
    StageBeamConfig,
    SwiresConfig,
    TokenBeamConfig,
)
from llava_cot.stages import LLAVA_COT, STAGES, Grammar, Stage
from llava_cot.tiny import tiny_path

__all__ = [
    "LLAVA_COT",
    "STAGES",
    "Answer",
    "BestOfNConfig",
    "Budget",
    "Calibration",
    "Finished",
    "Grammar",
    "GreedyConfig",
    "MajorityConfig",
    "SampleConfig",
    "SearchOutput",
    "SentenceBeamConfig",
    "Stage",
    "StageBeamConfig",
    "SwiresConfig",
    "SwiresGenerator",
    "TokenBeamConfig",
    "tiny_path",
]
