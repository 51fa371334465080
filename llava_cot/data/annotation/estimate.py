"""Estimate what a run would do and cost before it starts."""

from collections.abc import Iterable

from llava_cot.data.annotation.cost import (
    ANNOTATION_TOKENS,
    CHARACTERS_PER_TOKEN,
    VERDICT_TOKENS,
    Estimate,
    Prices,
    Usage,
    prompt_tokens,
    text_tokens,
)
from llava_cot.data.annotation.images import SentImage
from llava_cot.data.annotation.past import Past
from llava_cot.data.annotation.prompts import annotation_messages, judge_messages
from llava_cot.data.annotation.questions import Question


def estimate_run(questions: Iterable[Question], past: Past, image_tokens: int, prices: Prices | None) -> Estimate:
    """Estimate what these questions take, from the records of ``past`` if there are any, else from text lengths."""
    records = turns = 0
    usage = Usage()
    for question in questions:
        records += 1
        turns += len(question.conversation.turns)
        usage.add(_guess(question, image_tokens))
    if past.turns:
        mean = past.accepted_usage
        figures = (mean.requests, mean.prompt_tokens, mean.completion_tokens)
        usage = Usage(*(round(figure / past.turns * turns) for figure in figures))
    cost = None if prices is None else prices.cost(usage)
    return Estimate(records, turns, usage, past.records, cost)


def _guess(question: Question, image_tokens: int) -> Usage:
    """Estimate a conversation in which each turn is written once and judged by a model."""
    usage, written = Usage(), list[str]()
    images = [SentImage("", "")] * len(question.conversation.images)
    for turn in question.conversation.turns:
        judged = text_tokens(judge_messages(turn.question, turn.answer, turn.answer)[0]["content"])
        asked = prompt_tokens(annotation_messages(question, images, written), image_tokens)
        usage.add(Usage(2, asked + judged, ANNOTATION_TOKENS + VERDICT_TOKENS))
        written.append(" " * (CHARACTERS_PER_TOKEN * ANNOTATION_TOKENS))  # about as long as a reply
    return usage
