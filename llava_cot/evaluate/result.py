"""The result of one question: a line of ``results.jsonl``."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from math import inf
from typing import Any

from llava_cot.evaluate.question import Question, Verdict

GRADED = "graded by "  # begins the rule of a grade; the judge's name follows


@dataclass(frozen=True)
class Result:
    """What a model answered to a question in one repeat, and the verdict on it.

    Attributes:
        id: the question's.
        repeat: from 0 on.
        text: everything the model wrote, tags included.
        conclusion: the text of the grammar's conclusion; empty if there is none.
        outcome: how the conclusion was written, ``llava_cot.stages.Outcome``, or "failed" if there is no answer.
        score, correct, extracted, rule: the verdict, see ``llava_cot.evaluate.question.Verdict``.
        usage: ``llava_cot.core.Usage`` as a mapping, with "retraces".
        error: what went wrong, if the question could not be answered.
        seed: of this search: ``SwiresGenerator.answer(..., seed=seed)`` repeats it. None if the text came from a file.
    """

    id: str
    repeat: int
    text: str
    conclusion: str
    outcome: str
    score: float | None
    correct: bool | None
    extracted: str | None
    rule: str
    usage: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None
    seed: int | None = None

    @classmethod
    def from_dict(cls, row: Any) -> "Result":
        """Return the result that a line of ``results.jsonl`` holds.

        Raises:
            ValueError: it is none. The message says why.
        """
        if not isinstance(row, dict):
            raise ValueError(f"no object, but {type(row).__name__}")
        if unknown := row.keys() - TYPES.keys():
            raise ValueError(f"{min(unknown)!r}, which this version does not know")
        for name, types in TYPES.items():
            if name not in row and name not in ("usage", "error", "seed"):
                raise ValueError(f"no {name}")
            value = row.get(name, {} if name == "usage" else None)
            if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
                raise ValueError(f"{name} {value!r:.80}")
        numbers = [row["repeat"], *row.get("usage", {}).values()]
        if not all(isinstance(number, (int, float)) and 0 <= number < inf for number in numbers):
            raise ValueError(f"repeat and usage {numbers!r:.80}, which must be finite and >= 0")
        if row["score"] is not None and not 0 <= row["score"] <= 1:
            raise ValueError(f"score {row['score']!r}, which must be in [0, 1]")
        return cls(**row)

    @classmethod
    def failed(cls, id: str, repeat: int, error: str, seed: int) -> "Result":
        """The result of a question that could not be answered."""
        error = error.encode(errors="backslashreplace").decode()  # a path may hold bytes that are no text
        return cls(id, repeat, "", "", "failed", None, None, None, "no answer", error=error, seed=seed)

    def with_verdict(self, verdict: Verdict) -> "Result":
        """The same answer with another verdict."""
        row = self.to_dict() | {"score": verdict.score, "correct": verdict.correct}
        return Result(**row | {"extracted": verdict.extracted, "rule": verdict.rule})

    def to_dict(self) -> dict[str, Any]:
        """A mapping that JSON can hold; ``Result(**mapping)`` is the inverse."""
        return asdict(self) | {"usage": dict(self.usage)}


NOTHING = type(None)
TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("id", "text", "conclusion", "outcome", "rule"), (str,)),
    **dict.fromkeys(("extracted", "error"), (str, NOTHING)),
    **{"repeat": (int,), "score": (int, float, NOTHING), "correct": (bool, NOTHING)},
    **{"usage": (dict,), "seed": (int, NOTHING)},
}


@dataclass(frozen=True)
class Scored:
    """A question with its result, as metrics and reports read it."""

    question: Question
    result: Result
