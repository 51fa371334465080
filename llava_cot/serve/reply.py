"""What the server says of a finished search, in the terms that all of its APIs share."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from llava_cot.answer import Answer
from llava_cot.core import Usage
from llava_cot.stages import Grammar, StageText


@dataclass(frozen=True)
class Texts:
    """The text of an answer in two parts. ``reasoning`` is that of the stages before the conclusion."""

    reasoning: str
    content: str


def texts_of(grammar: Grammar, text: str, *, ended: bool) -> Texts:
    """Split an answer, or what there is of it so far."""
    return texts_in(grammar, text, grammar.parse(text, ended=ended))


def texts_in(grammar: Grammar, text: str, stages: Mapping[str, StageText]) -> Texts:
    """As ``texts_of``, where the stages of ``text`` are known."""
    content = grammar.conclusion_of(text, stages).text
    before = [stage.text for name, stage in stages.items() if name != grammar.conclusion and stage.text]
    return Texts("\n\n".join(before), content)


@dataclass(frozen=True)
class Tokens:
    """How the tokens that a search drew were used; all counts are tokens."""

    reasoning: int  # in the answer, before its content
    content: int
    discarded: int  # in no answer

    @classmethod
    def of(cls, answer: Answer, content: str, token_bytes: Sequence[bytes]) -> "Tokens":
        """Count the tokens of an answer. A token that is partly content counts as content."""
        drawn = answer.usage.generated_tokens
        at = answer.text.rfind(content) if content else -1
        left = len(answer.text[at:].encode()) if at >= 0 else 0
        in_content = 0
        for token in reversed(answer.tokens):
            if left <= 0:
                break
            left -= len(token_bytes[token]) if token < len(token_bytes) else 0
            in_content += 1
        return cls(len(answer.tokens) - in_content, in_content, max(0, drawn - len(answer.tokens)))


def usage_of(answers: Sequence[Answer], tokens: Sequence[Tokens]) -> dict[str, Any]:
    """Return the chat API's ``usage``: of all answers of a request, everything that was drawn for them."""
    prompt = answers[0].trace.data["prompt_tokens"] if answers else 0
    drawn = sum(part.reasoning + part.content + part.discarded for part in tokens)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": drawn,
        "total_tokens": prompt + drawn,
        "completion_tokens_details": {
            "reasoning_tokens": sum(part.reasoning + part.discarded for part in tokens),
            "discarded_tokens": sum(part.discarded for part in tokens),
        },
    }


def total(answers: Sequence[Answer]) -> dict[str, Any]:
    """Return what all searches of a request cost together, by the names of ``Usage``."""
    parts = [asdict(answer.usage) for answer in answers]
    return {name: sum(part[name] for part in parts) for name in asdict(Usage())}


def described(answer: Answer) -> dict[str, Any]:
    """Return what the ``llava_cot`` object of a reply says of one search."""
    trace = answer.trace
    nodes = trace.nodes.values()
    path = trace.path(trace.data["answer"])
    return {
        "search": {
            "name": trace.data["search"],
            "seed": trace.data["seed"],
            "rounds": max((node["round"] for node in nodes), default=1),
            "retraces": len(trace.events("retraced")),
            "candidates": len(trace.nodes),
            "budget_spent": [event["what"] for event in trace.events("budget_spent")],
        },
        "stages": {
            str(name): {"text": part.text, "outcome": str(part.outcome)} for name, part in answer.stages.items()
        },
        "scores": [node["score"] for node in path],
        "violation": answer.violation,
        "usage": asdict(answer.usage),
    }


def logprobs_of(answer: Answer, token_bytes: Sequence[bytes]) -> dict[str, Any]:
    """Return the chat API's ``logprobs``: one entry for each token of the whole answer, its reasoning included."""
    path = answer.trace.path(answer.trace.data["answer"])
    pairs = [pair for node in path for pair in zip(node["tokens"], node["logprobs"])]
    return {"content": [token_logprob(token, logprob, token_bytes) for token, logprob in pairs], "refusal": None}


def token_logprob(token: int, logprob: float, token_bytes: Sequence[bytes]) -> dict[str, Any]:
    data = token_bytes[token] if token < len(token_bytes) else b""
    return {"token": data.decode(errors="replace"), "logprob": logprob, "bytes": [*data], "top_logprobs": []}
