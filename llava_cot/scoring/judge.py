"""The model as its own judge. It is asked about its candidates, and the log-probs of its verdict give the score."""

import math
import re
from collections.abc import Sequence
from itertools import permutations
from statistics import fmean
from typing import TYPE_CHECKING, Literal, NamedTuple

from llava_cot.chat import turn_tokens
from llava_cot.core import Continuation, Expand, Extend, Feature, Program, SamplingParams
from llava_cot.scoring.scorer import Span

if TYPE_CHECKING:
    from transformers import ProcessorMixin

YES_NO = "Is the {stage} above right for this image and question? Answer yes or no."
PAIRWISE = (
    "Here are two candidates for the {stage} of an answer to this question.\n\nResponse 1: {first}\n\n"
    "Response 2: {second}\n\nWhich one is more accurate for the image, more complete and better reasoned? "
    "Answer 1 or 2."
)
VERDICT_TOKENS = 16


class _Verdict(NamedTuple):
    probability: float  # of the first word against the second
    label_mass: float | None = None  # the total probability of both; None if the verdict was written


class JudgeScorer:
    """Scores a candidate by the probability, in [0, 1], that the model's verdict is in its favour.

    With ``mode="yes_no"`` the judge is asked after each candidate whether it is right; the score is P(yes) / (P(yes) +
    P(no)). With ``mode="pairwise"`` it is asked after the prompt which of two candidates is better. Every pair is asked
    about in both orders, because judges tend to prefer a position. The score is the mean probability that the candidate
    wins. The pages of the candidates or of the prompt are shared. Only the questions to the judge are computed, those
    for all candidates of all searches as one batch.

    The notes of the trace have the total probability of the two verdicts' tokens as ``label_mass``, of pairs its mean.
    Where it is low, the model would rather have said something else, and the score means little.

    With ``generate=True`` the model writes its verdict instead (greedily, at most 16 tokens). The first of the two
    words in it gives the score: 1, 0, or 0.5 if neither occurs. This resembles the published judge, whose wording
    differs and whose pairs are random.

    Args:
        processor: the processor of the model that searches, with its chat template.
        prompt: the question to the judge, with ``{stage}``; for pairs also with ``{first}`` and ``{second}``.
        words: the verdicts for and against: by default "yes" and "no", or "1" and "2".

    Raises:
        ValueError: an unknown mode, another field in ``prompt``, or verdicts that begin with the same tokens.
        TypeError: ``processor`` is none.

    Source: arXiv 2411.10440v1 (pairs), 2512.19433 (yes-logit), 2502.06233 (P(True)).
    """

    needs = frozenset({Feature.EXTEND})

    def __init__(
        self,
        processor: "ProcessorMixin",
        mode: Literal["yes_no", "pairwise"] = "yes_no",
        *,
        prompt: str | None = None,
        words: tuple[str, str] | None = None,
        generate: bool = False,
    ) -> None:
        if mode not in ("yes_no", "pairwise"):
            raise ValueError(f"mode must be 'yes_no' or 'pairwise', got {mode!r}")
        if not hasattr(processor, "tokenizer"):
            raise TypeError(f"processor must be the model's processor, got {processor!r}")
        self.processor, self.mode, self.generate = processor, mode, generate
        self.groupwise = mode == "pairwise"
        self.__name__ = f"judge_{mode}"
        self.prompt = prompt or (YES_NO if mode == "yes_no" else PAIRWISE)
        self.words = words or (("yes", "no") if mode == "yes_no" else ("1", "2"))
        try:
            self.prompt.format(stage="", first="", second="")
        except (LookupError, ValueError):
            fields = "{stage}, {first} and {second}"
            raise ValueError(f"prompt must have no field but {fields}, got {self.prompt!r}") from None
        if isinstance(self.words, str) or len(self.words) != 2:
            raise ValueError(f"words must be two verdicts, got {self.words!r}")
        self._ids = label_tokens(processor, self.words)

    def __call__(self, spans: Sequence[Span]) -> Program[list[float]]:
        if self.mode == "yes_no":
            asked = [self._ask(span.id, span.tokens, stage=span.stage or "answer") for span in spans]
            verdicts = yield from self._verdicts(asked)
            for span, verdict in zip(spans, verdicts):
                _note(span, [verdict])
            return [verdict.probability for verdict in verdicts]
        pairs = [*permutations(range(len(spans)), 2)]
        asked = [
            self._ask(
                spans[first].root,
                (),
                stage=spans[first].stage or "answer",
                first=spans[first].text.strip(),
                second=spans[second].text.strip(),
            )
            for first, second in pairs
        ]
        wins = yield from self._verdicts(asked)
        own: list[list[_Verdict]] = [[] for _ in spans]
        for (first, second), win in zip(pairs, wins):
            own[first].append(win)
            own[second].append(win._replace(probability=1 - win.probability))
        for span, verdicts in zip(spans, own):
            _note(span, verdicts)
        return [fmean(verdict.probability for verdict in verdicts) if verdicts else 1.0 for verdicts in own]

    def _verdicts(self, asked: list[Extend]) -> Program[list[_Verdict]]:
        """Return the verdict on each question asked."""
        read: list[Continuation] = [found for (found,) in (yield asked)] if asked else []
        if self.generate and read:
            greedy = SamplingParams(temperature=0.0)
            replies = yield [Expand(found.id, (0,), greedy, VERDICT_TOKENS, frozenset()) for found in read]
            return [_Verdict(self._read(drawn.text)) for (drawn,) in replies]
        number = len(self._ids[0])
        sides = [(logsumexp(found.wanted[:number]), logsumexp(found.wanted[number:])) for found in read]
        return [
            _Verdict(0.5 + 0.5 * math.tanh((for_it - against) / 2), math.exp(for_it) + math.exp(against))  # the sigmoid
            for for_it, against in sides
        ]

    def _read(self, verdict: str) -> float:
        found = re.search(rf"\b({'|'.join(map(re.escape, self.words))})\b", verdict, re.IGNORECASE)
        return 0.5 if found is None else float(found[1].lower() == self.words[0].lower())

    def _ask(self, parent: int, written: Sequence[int], **facts: str) -> Extend:
        """Return the question to the judge as a new turn after ``parent``, whose own tokens are ``written``."""
        tokens = turn_tokens(self.processor, self.prompt.format(**facts), written)
        return Extend(parent, tokens, want=() if self.generate else tuple(self._ids[0] + self._ids[1]))


def label_tokens(processor: "ProcessorMixin", words: Sequence[str]) -> list[list[int]]:
    """Return the tokens that each of ``words`` may begin with: capitalised or not, with or without a space before it.

    A token that two words may begin with tells nothing, such as a lone space, and is left out.

    Raises:
        ValueError: nothing is left of a word.
    """
    firsts: list[set[int]] = []
    for word in words:
        forms = [form for plain in (word, word.capitalize()) for form in (plain, f" {plain}")]
        firsts.append({processor.tokenizer(form, add_special_tokens=False).input_ids[0] for form in forms})
    ids = [sorted(own - set().union(*(firsts[:at] + firsts[at + 1 :]))) for at, own in enumerate(firsts)]
    if not all(ids):
        raise ValueError(f"words must begin with different tokens, got {tuple(words)}")
    return ids


def _note(span: Span, verdicts: Sequence[_Verdict]) -> None:
    masses = [verdict.label_mass for verdict in verdicts if verdict.label_mass is not None]
    if masses:
        span.notes["label_mass"] = fmean(masses)


def logsumexp(logprobs: Sequence[float]) -> float:
    """Return the log of the total probability of tokens with these log-probs."""
    most = max(logprobs)
    if most == -math.inf:
        return most
    return most + math.log(math.fsum(math.exp(logprob - most) for logprob in logprobs))
