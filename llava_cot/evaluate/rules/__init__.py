"""Rule sets: named ways to tell from text whether an answer is right."""

from collections.abc import Callable

from llava_cot.evaluate.question import Question, Verdict
from llava_cot.evaluate.rules.compat import compat
from llava_cot.evaluate.rules.math import math
from llava_cot.evaluate.rules.strict import strict

RULES: dict[str, Callable[[Question, str], Verdict]] = {"compat": compat, "strict": strict, "math": math}
LONGEST = 50_000  # characters of an answer that is read; a conclusion has a few hundred at most


def judge(question: Question, answer: str, rules: str) -> Verdict:
    """Return the verdict of the rule set ``rules`` on ``answer``.

    The stage parser comes first: the runner hands over the conclusion that it found and nothing else of the text. If
    the grammar has no stages, the whole text is the answer. An answer of more than 50,000 characters is not read, and
    the verdict is that the rules can't tell.

    Raises:
        ValueError: there is no such rule set, or what it needs is not installed.
    """
    if rules not in RULES:
        raise ValueError(f"rules must be one of {list(RULES)}, got {rules!r}")
    if len(answer) > LONGEST:
        return Verdict(None, None, f"longer than {LONGEST} characters")
    return RULES[rules](question, answer)
