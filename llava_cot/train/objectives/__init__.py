"""The objectives of training, one per file."""

from llava_cot.train.config import TrainConfig
from llava_cot.train.objectives.dpo import Dpo
from llava_cot.train.objectives.objective import Objective
from llava_cot.train.objectives.reward import Reward
from llava_cot.train.objectives.sft import Sft


def objective_of(config: TrainConfig) -> Objective:
    if config.objective == "dpo":
        return Dpo(config.dpo)
    if config.objective == "reward":
        return Reward()
    return Sft(config.stage_weights)
