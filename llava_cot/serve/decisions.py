"""``POST /v1/decisions``: typed questions about an input, each answered with a probability for every option.

Nothing is generated. The input is prefilled once, every question is a turn of the user after it, and the probabilities
are those of the first token of each option's label. They are normalised over the labels. ``label_mass`` is what the
labels had together before that: where it is low, the model would rather have said something else, and the answer means
little. The shape is that of OpenAI's decisions API; ``label_mass`` is an addition.
"""

import math
import string
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from llava_cot.core import Continuation, Extend, Finish, Program
from llava_cot.scoring.judge import label_tokens, logsumexp
from llava_cot.search.plan import Plan
from llava_cot.search.sample import Limits as SearchLimits
from llava_cot.search.search import Search
from llava_cot.search.tree import Node
from llava_cot.serve.held import Holding
from llava_cot.serve.intake import Intake, Work, within
from llava_cot.serve.metrics import Metrics
from llava_cot.serve.responses import input_conversation
from llava_cot.serve.running import ended
from llava_cot.serve.schema import Choice, DecisionsRequest, Option, Predicate, Score

MAX_QUESTIONS = 64
Question = Predicate | Choice | Score


@dataclass(frozen=True, eq=False)
class Decided(Work):
    """The work of a request, with its questions. ``read`` is filled by the run, one list for each question."""

    questions: Sequence[Question] = ()
    read: list[tuple[list[float], float]] = field(default_factory=list)  # the labels' probabilities, and their mass


class Decisions:
    """Answers decision requests."""

    def __init__(self, intake: Intake, metrics: Metrics) -> None:
        self._intake, self._generator, self._metrics = intake, intake.generator, metrics

    async def work(self, request: DecisionsRequest, holding: Holding) -> Decided:
        """Return the checked work of a request, whose images ``holding`` counts.

        Raises:
            RequestError: it is wrong. The error names the field.
        """
        intake, generator = self._intake, self._generator
        intake.presets.search_of(request.model)
        within("questions must have", len(request.questions), 1, MAX_QUESTIONS, "entries")
        conversation = input_conversation(request.input)
        question, urls = intake.conversation(conversation)
        within("the text of questions", sum(len(asked(each)) for each in request.questions), 1, intake.limits.max_text)
        read: list[tuple[list[float], float]] = []
        labels = [labels_of(each) for each in request.questions]
        turns = await intake.count(question, conversation.field, turns=[asked(each) for each in request.questions])

        def policy(search: Search) -> Program[list[Node]]:
            ids = [label_tokens(generator.processor, each) for each in labels]
            wanted = [tuple(token for group in groups for token in group) for groups in ids]
            requests = [Extend(search.session.root, turn, want=want) for turn, want in zip(turns, wanted)]
            replies = yield requests
            read.extend(_probabilities(found.wanted, groups) for (found,), groups in zip(replies, ids))
            none = Continuation(-1, search.session.root, finish=Finish.EOS)
            return [search.node(search.root, None, 1, 0, none, True)]

        budget = intake.budget({}, 1)
        plan = Plan("decisions", SearchLimits(max_new_tokens=1, budget=budget), policy)
        images = await intake.load(urls, holding)
        return Decided(request.model, plan, question, images, (0,), conversation.field, request.questions, read)

    async def reply(self, request: DecisionsRequest, work: Decided) -> dict[str, Any]:
        """Return the body of the reply."""
        with self._metrics.request(work.plan.name) as measured:
            (run,) = await ended(self._generator, work)
            measured.count(run.search.usage, "stop")
        read = run.search.usage.prompt_tokens
        return {
            "model": work.model,
            "answers": [_answer(question, *found) for question, found in zip(work.questions, work.read)],
            "usage": {
                "input_tokens": read,
                "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
                "output_tokens": 0,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": read,
            },
        }


def labels_of(question: Question) -> list[str]:
    """Return what the model may answer: yes and no, a letter for each choice, or a digit for each level."""
    if isinstance(question, Predicate):
        return ["yes", "no"]
    if isinstance(question, Choice):
        return [*string.ascii_uppercase[: len(question.choices)]]
    return [str(at) for at in range(len(question.levels))]


def asked(question: Question) -> str:
    """Return the question as the model reads it."""
    if isinstance(question, Predicate):
        return f"{question.instructions}\nIs this true? Answer yes or no."
    if isinstance(question, Choice):
        lines = [
            _line(label, _text(option), option.description)
            for label, option in zip(labels_of(question), question.choices)
        ]
        return "\n".join([question.instructions, *lines, "Answer with the letter of the right choice."])
    lines = [_line(label, level.label, level.description) for label, level in zip(labels_of(question), question.levels)]
    return "\n".join([question.instructions, *lines, "Answer with the number of the right level."])


def _line(label: str, text: str, description: str | None) -> str:
    return f"{label}. {text}" + (f": {description}" if description else "")


def _text(option: Option) -> str:
    return option.value if isinstance(option.value, str) else str(option.value).lower()


def _probabilities(wanted: Sequence[float], groups: Sequence[Sequence[int]]) -> tuple[list[float], float]:
    """Return the probability of each label among the labels, and their total; a label may have several tokens."""
    left = iter(wanted)
    masses = [math.exp(logsumexp([*islice(left, len(group))])) for group in groups]
    total = math.fsum(masses)
    return [mass / total if total else 1 / len(masses) for mass in masses], total


def _answer(question: Question, probabilities: list[float], label_mass: float) -> dict[str, Any]:
    head = {"type": question.type, "name": question.name, "label_mass": label_mass}
    if isinstance(question, Predicate):
        return {**head, "probability": probabilities[0]}
    most = max(probabilities)
    if isinstance(question, Choice):
        pairs = zip(question.choices, probabilities)
        shown = [{"value": option.value, "probability": probability} for option, probability in pairs]
        chosen = question.choices[probabilities.index(most)].value
        return {**head, "choice": chosen, "confidence": most, "probabilities": shown}
    levels = [
        {"label": level.label, "value": at, "probability": probability}
        for at, (level, probability) in enumerate(zip(question.levels, probabilities))
    ]
    score = math.fsum(at * probability for at, probability in enumerate(probabilities))
    return {**head, "score": score, "confidence": most, "probabilities": levels}
