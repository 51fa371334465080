"""Self-consistency: what most candidates say is more often right. These scorers compare the candidates of a pool."""

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from llava_cot.core import Continuation, Expand, Extend, Feature, Finish, Program, SamplingParams
from llava_cot.scoring.confidence import confidence
from llava_cot.scoring.scorer import Span, groupwise, needing
from llava_cot.stages import Outcome
from llava_cot.stages import asked as asked_text
from llava_cot.text import normalise

SAME = 0.75  # the least overlap of clauses (intersection over union) between a text and the others of its cluster
_CLAUSE = re.compile(r"[.;,\n]+(?:\s|$)")


@groupwise
@needing(Feature.LOGPROBS)
def self_consistency(spans: Sequence[Span]) -> list[float]:
    """Return for each candidate the share of candidates that state the same facts. This is for long texts.

    A text is the set of its clauses. Its cluster is all texts whose clauses overlap with its own by three quarters.
    Candidates of the largest cluster rank first, and among them the one most like the others, the medoid. Ties go to
    the more confident one. A candidate that is not closed has no facts (arXiv 2203.11171 for votes; arXiv 2604.12196
    for the medoid).
    """
    facts = [_facts(span) for span in spans]
    alike = [[_overlap(one, other) for other in facts] for one in facts]
    scores = []
    for index, row in enumerate(alike):
        cluster = [similarity for similarity in row if similarity >= SAME] if facts[index] else [0.0]
        scores.append((len(cluster) - 1 + math.fsum(cluster) / len(cluster)) / len(spans))
    return [score + 1e-6 * math.exp(sure) for score, sure in zip(scores, confidence(spans))]


@groupwise
@needing(Feature.LOGPROBS)
def vote(spans: Sequence[Span]) -> list[float]:
    """Return the share of votes for each candidate's answer. A vote weighs exp(mean log-prob) (CISC, arXiv 2502.06233).

    The answer is the conclusion if there is one, else the candidate's text, as ``normalise`` writes it. A candidate
    that is not closed gets 0, but its weight still counts in the total.
    """
    return _shares([_answer(span) if span.closed else None for span in spans], confidence(spans))


@groupwise
@needing(Feature.LOGPROBS)
def look_ahead(spans: Sequence[Span]) -> Program[list[float]]:
    """Return the share of votes for the conclusion that greedy decoding reaches from each candidate.

    It decodes the rest of an answer for each candidate, all as one batch. For conclusions it equals ``vote``. Where the
    grammar has turns of the user, it asks those that are left.
    """
    ends = [_End(span, span.path_text, span.id, tuple(span.tokens[-1:]), span.tokens_left) for span in spans]
    growing = [end for end in ends if end.span.closed and end.left > 0 and not _has_conclusion(end.span)]
    greedy = SamplingParams(temperature=0.0)
    while growing:
        asking = [(end, turn) for end in growing if (turn := end.turn())]
        if asking:
            asked = yield [Extend(end.id, end.span.turn_tokens(turn, end.tokens)) for end, turn in asking]  # type: ignore
            for (end, turn), (given,) in zip(asking, asked):
                end.add(given, asked_text(turn))
        replies = yield [Expand(end.id, (0,), greedy, end.left, frozenset()) for end in growing]
        for end, (drawn,) in zip(growing, replies):
            end.add(drawn, drawn.text)
            end.left -= len(drawn.tokens)
        growing = [end for end in growing if end.left > 0 and end.finish is Finish.EOS and end.turn()]
    answers = []
    for span, text in ((end.span, end.text) for end in ends):
        stage = span.grammar.parse(text)[span.grammar.conclusion]
        is_whole = span.closed and stage.outcome is Outcome.COMPLETE
        answers.append(normalise(stage.text) if is_whole else None)
    return _shares(answers, confidence(spans))


@dataclass
class _End:
    """How far the rest of an answer has come behind a candidate. ``tokens`` are those of continuation ``id``."""

    span: Span
    text: str
    id: int
    tokens: tuple[int, ...]
    left: int
    finish: Finish | None = None

    def turn(self) -> str | None:
        """The user's turn that comes next, if one does."""
        grammar = self.span.grammar
        stage = grammar.next_turn([part.name for part in grammar.parts(self.text)]) if grammar.turns else None
        return stage and grammar.turns[stage]

    def add(self, longer: Continuation, text: str) -> None:
        self.text, self.id, self.tokens, self.finish = self.text + text, longer.id, longer.tokens, longer.finish


def _has_conclusion(span: Span) -> bool:
    stages = span.grammar.parse(span.path_text, ended=span.closed)
    return stages[span.grammar.conclusion].outcome is Outcome.COMPLETE


def _answer(span: Span) -> str:
    if span.stage:
        return normalise(span.grammar.body(span.text, span.stage))
    conclusion = span.grammar.parse(span.text, ended=span.closed)[span.grammar.conclusion]
    return normalise(span.text if conclusion.outcome is Outcome.MISSING else conclusion.text)


def _facts(span: Span) -> set[str]:
    body = span.grammar.body(span.text, span.stage) if span.stage else span.text
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
