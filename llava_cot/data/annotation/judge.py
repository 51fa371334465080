"""Judge whether a conclusion agrees with the standard answer, by spelling or else by a model's clear "valid"."""

import json
import re
from dataclasses import asdict, dataclass
from typing import Any, Literal

from llava_cot.data.annotation.client import Chat, Reply
from llava_cot.data.annotation.cost import VERDICT_TOKENS, Usage
from llava_cot.data.annotation.prompts import VERDICT_SCHEMA, judge_messages
from llava_cot.endpoint import RequestRefused
from llava_cot.text import normalise

_FENCED = re.compile(r"\s*```(?:json)?\s*(.*?)\s*```\s*", re.DOTALL)
STRUCTURED = {
    "type": "json_schema",
    "json_schema": {"name": "verdict", "strict": True, "schema": VERDICT_SCHEMA},
}


@dataclass(frozen=True)
class Verdict:
    """The verdict on an answer: whether it is valid, who decided it, and why."""

    is_valid: bool
    by: Literal["match", "model"]
    reason: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Judge:
    """Asks for structured output until the endpoint refuses it, and then for the same JSON as text."""

    def __init__(self, client: Chat) -> None:
        self._client = client
        self._is_structured = True

    async def judge(self, question: str, reference: str, answer: str, usage: Usage) -> Verdict:
        """Judge ``answer`` against ``reference``. It raises what ``ChatClient.ask`` raises."""
        if normalise(answer) == normalise(reference):
            return Verdict(True, "match", "")
        messages = judge_messages(question, reference, answer)
        if self._is_structured:
            try:
                return read_verdict(await self._client.ask(messages, usage, VERDICT_TOKENS, response_format=STRUCTURED))
            except RequestRefused:
                pass
        reply = await self._client.ask(messages, usage, VERDICT_TOKENS)
        self._is_structured = False  # only now it is certain that the format was refused
        return read_verdict(reply)


def read_verdict(reply: Reply) -> Verdict:
    """Read a verdict. Only a complete JSON object whose verdict is "valid" is valid; a code fence may surround it."""
    if reply.refusal:
        return Verdict(False, "model", f"the judge refused: {reply.refusal}")
    if reply.is_cut:
        return Verdict(False, "model", "the judge's reply is cut off")
    fenced = _FENCED.fullmatch(reply.text)
    try:
        data = json.loads(fenced[1] if fenced else reply.text, object_pairs_hook=_without_repetition)
    except (ValueError, RecursionError):
        data = None
    if not isinstance(data, dict) or data.get("verdict") not in ("valid", "invalid"):
        return Verdict(False, "model", f"the judge's reply is not a verdict: {reply.text[:200]!r}")
    return Verdict(data["verdict"] == "valid", "model", str(data.get("reason") or ""))


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a verdict that is given twice is not clear")
    return dict(pairs)
