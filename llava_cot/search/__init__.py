"""Which branches to grow next: one policy a file, each a coroutine over a tree of stage candidates."""

from collections.abc import Callable
from typing import Any

from llava_cot.search.best_of_n import BestOfNConfig, best_of_n
from llava_cot.search.greedy import GreedyConfig, greedy
from llava_cot.search.majority import MajorityConfig, majority
from llava_cot.search.sample import SampleConfig, sample
from llava_cot.search.sentence_beam import SentenceBeamConfig, sentence_beam
from llava_cot.search.stage_beam import StageBeamConfig, stage_beam
from llava_cot.search.swires import SwiresConfig, swires
from llava_cot.search.token_beam import TokenBeamConfig, token_beam

# name -> (its configuration, the policy); a policy takes the search and its configuration
POLICIES: dict[str, tuple[type, Callable[..., Any]]] = {
    "greedy": (GreedyConfig, greedy),
    "sample": (SampleConfig, sample),
    "best_of_n": (BestOfNConfig, best_of_n),
    "majority": (MajorityConfig, majority),
    "sentence_beam": (SentenceBeamConfig, sentence_beam),
    "stage_beam": (StageBeamConfig, stage_beam),
    "token_beam": (TokenBeamConfig, token_beam),
    "swires": (SwiresConfig, swires),
}
