"""What may describe workers and scorers by name, so that it can be checked before weights are loaded. No torch."""

import re

from llava_cot.scoring import SCORERS

REWARD = "reward:"
_RAY = re.compile(r"ray:([1-9][0-9]{0,4})")


def check_workers(workers: str) -> None:
    """Raise ``ValueError`` unless ``workers`` describes some."""
    if workers != "local" and not _RAY.fullmatch(workers):
        raise ValueError(f"workers must be 'local' or 'ray:N' with N >= 1, got {workers!r}")


def check_scorer_name(scorer: str) -> None:
    """Raise ``ValueError`` unless workers know a scorer of that name."""
    if scorer not in SCORERS and scorer != "verifier" and not scorer.startswith(REWARD):
        raise ValueError(f"scorer must be one of {sorted(SCORERS)}, 'verifier' or 'reward:FOLDER', got {scorer!r}")
