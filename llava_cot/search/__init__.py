"""Search policies, one to a file. Each is a coroutine that decides which continuations to grow next."""

from llava_cot.search.best_of_n import BestOfNConfig
from llava_cot.search.budget import Budget
from llava_cot.search.greedy import GreedyConfig
from llava_cot.search.majority import MajorityConfig
from llava_cot.search.plan import POLICIES, Plan, Policy, SearchLike, make_plan, settings_of
from llava_cot.search.sample import SampleConfig
from llava_cot.search.search import NEXT, BudgetSpent, Search
from llava_cot.search.sentence_beam import SentenceBeamConfig
from llava_cot.search.stage_beam import StageBeamConfig
from llava_cot.search.swires import SwiresConfig
from llava_cot.search.token_beam import TokenBeamConfig
from llava_cot.search.tree import Node

__all__ = [
    "NEXT",
    "POLICIES",
    "BestOfNConfig",
    "Budget",
    "BudgetSpent",
    "GreedyConfig",
    "MajorityConfig",
    "Node",
    "Plan",
    "Policy",
    "SampleConfig",
    "Search",
    "SearchLike",
    "SentenceBeamConfig",
    "StageBeamConfig",
    "SwiresConfig",
    "TokenBeamConfig",
    "make_plan",
    "settings_of",
]
