"""What a run minimises, one file each."""

from llava_cot.train.config import TrainConfig
from llava_cot.train.objectives.objective import Objective
from llava_cot.train.objectives.sft import Sft


def objective_of(config: TrainConfig) -> Objective:
    return Sft(config.stage_weights)
