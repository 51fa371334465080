"""Self-consistency: what most candidates say is more often right. Scorers over a whole pool."""

import math
import re
from collections import defaultdict
from collections.abc import Sequence

from llava_cot.core import Expand, Program, SamplingParams
from llava_cot.scoring.confidence import confidence
from llava_cot.scoring.scorer import Span, groupwise
from llava_cot.stages import Outcome
from llava_cot.text import normalise

SAME = 0.75  # the share of facts that two texts of one cluster have in common
_CLAUSE = re.compile(r"[.;,\n]+(?:\s|$)")


@groupwise
def self_consistency(spans: Sequence[Span]) -> list[float]:
    """The share of candidates that say the same, most for the one that says it most like the others (the medoid).

    For long texts: a text is the set of its clauses, texts that share three quarters of them are of one cluster, and
    candidates of the largest one rank first; equals by confidence (arXiv 2203.11171 for votes; nearest to the centre,
    arXiv 2604.12196).
    """
    facts = [_facts(span) for span in spans]
    alike = [[_overlap(one, other) for other in facts] for one in facts]
    scores = []
    for index, row in enumerate(alike):
        cluster = [similarity for similarity in row if similarity >= SAME] if facts[index] else [0.0]
        scores.append((len(cluster) - 1 + math.fsum(cluster) / len(cluster)) / len(spans))
    return [score + 1e-6 * math.exp(sure) for score, sure in zip(scores, confidence(spans))]


@groupwise
def vote(spans: Sequence[Span]) -> list[float]:
    """The share of votes for a candidate's answer, each weighing exp(mean log-prob) (CISC, arXiv 2502.06233).

    The answer is the conclusion where there is one, else the text; both as ``normalise`` spells them. A candidate that
    is not closed has no vote and gets 0.
    """
    return _shares([_answer(span) if span.closed else None for span in spans], confidence(spans))


@groupwise
def look_ahead(spans: Sequence[Span]) -> Program[list[float]]:
    """The share of votes for the conclusion that greedy decoding comes to from each candidate.

    It costs the rest of an answer for each candidate, decoded as one batch. Of conclusions this is ``vote``.
    """
    open_ends = [span for span in spans if span.closed and span.tokens_left > 0 and not _has_conclusion(span)]
    greedy = SamplingParams(temperature=0.0)
    requests = [Expand(span.id, (0,), greedy, span.tokens_left, frozenset()) for span in open_ends]
    replies = (yield requests) if requests else []
    rest = {id(span): drawn.text for span, (drawn,) in zip(open_ends, replies)}
    answers = []
    for span in spans:
        text = span.path_text + rest.get(id(span), "")
        stage = span.grammar.parse(text)[span.grammar.conclusion]
        is_whole = span.closed and stage.outcome is Outcome.COMPLETE
        answers.append(normalise(stage.text) if is_whole else None)
    return _shares(answers, confidence(spans))


def _has_conclusion(span: Span) -> bool:
    return span.grammar.parse(span.path_text)[span.grammar.conclusion].outcome is Outcome.COMPLETE


def _answer(span: Span) -> str:
    stages = span.grammar.parse(span.text)
    conclusion = stages[span.grammar.conclusion]
    if conclusion.outcome is not Outcome.MISSING:
        return normalise(conclusion.text)
    return normalise(stages[span.stage].text if span.stage else span.text)


def _facts(span: Span) -> set[str]:
    body = span.grammar.parse(span.text)[span.stage].text if span.stage else span.text
    clauses = (normalise(clause) for clause in _CLAUSE.split(body))
    return {clause for clause in clauses if clause} if span.closed else set()


def _overlap(one: set[str], other: set[str]) -> float:
    return len(one & other) / len(one | other) if one | other else 0.0


def _shares(answers: Sequence[str | None], sure: Sequence[float]) -> list[float]:
    weights: dict[str | None, float] = defaultdict(float)
    for answer, logprob in zip(answers, sure):
        weights[answer] += math.exp(logprob)
    total = math.fsum(weights.values())
    return [weights[answer] / total if answer is not None else 0.0 for answer in answers]
