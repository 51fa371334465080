"""Take one conversation from its question to its record, accepted or rejected."""

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from llava_cot.data.annotation.check import sections_of, tidy, violation
from llava_cot.data.annotation.client import Chat
from llava_cot.data.annotation.cost import Usage
from llava_cot.data.annotation.images import SentImage, read_image
from llava_cot.data.annotation.judge import Judge, Verdict
from llava_cot.data.annotation.prompts import PROMPT_VERSION, annotation_messages
from llava_cot.data.annotation.questions import Question
from llava_cot.endpoint import RequestFailed
from llava_cot.stages import Stage

Kind = Literal["refusal", "violation", "judge", "error", "image"]


class Rejected(Exception):
    """The annotation failed, with the reason. ``reply`` is the last text of the model."""

    def __init__(self, kind: Kind, reason: str, reply: str = "") -> None:
        super().__init__(reason)
        self.kind, self.reason, self.reply = kind, reason, reply


@dataclass
class Progress:
    """The state of a question. ``usage`` counts all requests for it."""

    usage: Usage
    written: list[str] = field(default_factory=list)  # one text per turn
    verdicts: list[Verdict] = field(default_factory=list)
    attempts: list[int] = field(default_factory=list)
    key: str = ""
    model: str = ""


class Annotator:
    """Asks for each turn, with the earlier ones as history, until it passes the check and the judge.

    Args:
        folder: the folder that image paths are relative to.
        options: options of the requests. The model and everything that shapes its replies is in the content key.
        attempts: the most texts that are requested for a turn before the conversation is rejected.
    """

    def __init__(self, client: Chat, folder: Path, options: Mapping[str, Any], attempts: int) -> None:
        self._client, self._judge = client, Judge(client)
        self._folder, self._options, self._attempts = folder, dict(options), attempts

    async def annotate(self, question: Question, usage: Usage) -> tuple[bool, dict[str, Any]]:
        """Return whether the question is accepted, and its record.

        Raises:
            EndpointError: the endpoint accepts no request. Other errors of the endpoint become rejects.
        """
        progress = Progress(usage)
        try:
            await self._write(question, progress)
        except Rejected as why:
            record = {"id": question.row["id"], "kind": why.kind, "reason": why.reason}
            record |= {"turn": len(progress.written), "reply": why.reply}
            return False, {**record, "provenance": self._provenance(progress)}
        turns = []
        for turn, text in zip(question.conversation.turns, progress.written):
            turns += [{"from": "human", "value": turn.question}, {"from": "gpt", "value": text}]
        image = {"image": question.row["image"]} if question.row.get("image") is not None else {}
        record = {"id": question.row["id"], **image, "conversations": turns}
        return True, {**record, "provenance": self._provenance(progress)}

    async def _write(self, question: Question, progress: Progress) -> None:
        images = await self._images(question)
        progress.key = content_key(question, images, self._options)
        for _ in question.conversation.turns:
            progress.attempts.append(0)
            why = None
            while progress.attempts[-1] < self._attempts:
                progress.attempts[-1] += 1
                try:
                    text, verdict = await self._attempt(question, images, progress)
                except RequestFailed as error:
                    raise Rejected("error", str(error)) from None
                except Rejected as rejected:
                    why = rejected
                    if why.kind == "refusal":
                        raise
                else:
                    progress.written.append(text)
                    progress.verdicts.append(verdict)
                    break
            else:
                assert why is not None
                raise why

    async def _attempt(self, question: Question, images: list[SentImage], progress: Progress) -> tuple[str, Verdict]:
        turn = question.conversation.turns[len(progress.written)]
        messages = annotation_messages(question, images, progress.written)
        seed = self._options.get("seed")
        # The same seed would give the same text again.
        again = {} if seed is None else {"seed": seed + progress.attempts[-1] - 1}
        reply = await self._client.ask(messages, progress.usage, **again)
        progress.model = reply.model
        if reply.refusal:
            raise Rejected("refusal", reply.refusal, reply.text)
        found = "the reply is cut off at the limit of tokens" if reply.is_cut else violation(reply.text)
        if found is not None:
            raise Rejected("violation", found, reply.text)
        conclusion = sections_of(reply.text)[Stage.CONCLUSION]
        verdict = await self._judge.judge(turn.question, turn.answer, conclusion, progress.usage)
        if not verdict.is_valid:
            raise Rejected("judge", verdict.reason, reply.text)
        return tidy(reply.text), verdict

    async def _images(self, question: Question) -> list[SentImage]:
        try:
            # Images are decoded in threads, so that replies that arrive meanwhile need not wait.
            return [await asyncio.to_thread(read_image, self._folder / path) for path in question.conversation.images]
        except ValueError as error:
            raise Rejected("image", str(error)) from None

    def _provenance(self, progress: Progress) -> dict[str, Any]:
        return {
            "model": self._options["model"],
            "reported_model": progress.model,
            "prompt_version": PROMPT_VERSION,
            "content_key": progress.key,
            "verdicts": [verdict.to_dict() for verdict in progress.verdicts],
            "attempts": progress.attempts,
            "usage": progress.usage.to_dict(),
        }


def content_key(question: Question, images: list[SentImage], options: Mapping[str, Any]) -> str:
    """Hash all that shapes the reply by SHA-256: image bytes, turns, hints, prompt version, model and sampling."""
    turns = [(turn.question, turn.answer) for turn in question.conversation.turns]
    parts = [[image.sha256 for image in images], turns, question.hints, PROMPT_VERSION, dict(options)]
    return sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
