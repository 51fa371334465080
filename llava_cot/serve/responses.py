"""``POST /v1/responses``: the same searches in the shape of OpenAI's responses API."""

import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import Any

from llava_cot.answer import Answer
from llava_cot.serve.chat import Shown, named, narrated, new_id
from llava_cot.serve.errors import RequestError
from llava_cot.serve.intake import Asked, Conversation, Intake, Work
from llava_cot.serve.metrics import Metrics
from llava_cot.serve.reply import Texts, Tokens, described, texts_of
from llava_cot.serve.running import answers, follow
from llava_cot.serve.schema import (
    ImagePart,
    ImageUrl,
    InputImage,
    InputMessage,
    InputReasoning,
    Message,
    ResponsesRequest,
    TextPart,
)
from llava_cot.trace.writer import to_json


def asked_in_responses(request: ResponsesRequest) -> Asked:
    """Read a request of the responses API."""
    if request.llava_cot.output == "raw":
        raise RequestError(400, "llava_cot.output must be 'conclusion' in this API, got 'raw'", "llava_cot.output")
    effort = request.reasoning.effort if request.reasoning else None
    conversation = input_conversation(request.input, request.instructions)
    return Asked(request, conversation, 1, request.max_output_tokens, "max_output_tokens", effort)


def input_conversation(
    input: str | Sequence[InputMessage | InputReasoning], instructions: str | None = None
) -> Conversation:
    """Return the conversation of a request whose ``input`` has it, after its instructions. Reasoning is left out."""
    messages, fields = list[Message](), list[str]()
    if instructions is not None:
        messages, fields = [Message(role="system", content=instructions)], ["instructions"]
    if isinstance(input, str):
        return Conversation([*messages, Message(role="user", content=input)], "input", [*fields, "input"], "image_url")
    for at, item in enumerate(input):
        if not isinstance(item, InputReasoning):
            messages.append(_as_message(item))
            fields.append(f"input[{at}]")
    return Conversation(messages, "input", fields, "image_url")


def _as_message(item: InputMessage) -> Message:
    """Return a message of the responses API as one of the chat API."""
    if isinstance(item.content, str):
        return Message(role=item.role, content=item.content)
    parts: list[TextPart | ImagePart] = []
    for part in item.content:
        if isinstance(part, InputImage):
            parts.append(ImagePart(type="image_url", image_url=ImageUrl(url=part.image_url)))
        else:
            parts.append(TextPart(type="text", text=part.text))
    return Message(role=item.role, content=parts)


class Responses:
    """Answers requests of the responses API that are already checked."""

    def __init__(self, intake: Intake, metrics: Metrics) -> None:
        self._generator, self._metrics = intake.generator, metrics

    async def reply(self, request: ResponsesRequest, work: Work) -> dict[str, Any]:
        """Return the body of the reply."""
        with self._metrics.request(work.plan.name) as measured:
            found = await answers(self._generator, work)
            measured.done(found)
        return self._finished(self._head(work), found[0])

    async def stream(self, request: ResponsesRequest, work: Work) -> AsyncGenerator[dict[str, str], None]:
        """Yield the server-sent events of the reply."""
        head, events = self._head(work), Events()
        opened = {**head, "status": "in_progress", "output": []}
        yield events.make("response.created", response=opened)
        yield events.make("response.in_progress", response=opened)
        try:
            with self._metrics.request(work.plan.name) as measured:
                shown, parts = Shown((), self._generator.grammar), Parts(events, head)
                items = follow(self._generator, work, lambda run: None)
                async for _, item, _ in narrated(items, [shown], measured, _texts):
                    if isinstance(item, dict):
                        for made in parts.add(item):
                            yield made
                    elif isinstance(item, Answer):
                        answer = item
                    else:
                        yield events.make("llava_cot.event", llava_cot=named(item))
                measured.done([answer])
            for made in parts.close():
                yield made
            finished = self._finished(head, answer)
            kind = "response.completed" if finished["status"] == "completed" else "response.incomplete"
            yield events.make(kind, response=finished)
        except RequestError as error:
            failed = {
                **head,
                "status": "failed",
                "output": [],
                "error": {"code": "server_error", "message": error.message},
            }
            yield events.make("response.failed", response=failed)

    def _head(self, work: Work) -> dict[str, Any]:
        return {
            "id": new_id("resp"),
            "object": "response",
            "created_at": int(time.time()),
            "model": work.model,
            "error": None,
            "incomplete_details": None,
            "parallel_tool_calls": False,
            "tool_choice": "none",
            "tools": [],
            "store": False,
        }

    def _finished(self, head: dict[str, Any], answer: Answer) -> dict[str, Any]:
        texts = _texts(answer)
        tokens = Tokens.of(answer, texts.content, self._generator.vocabulary.token_bytes)
        prompt, drawn = answer.trace.data["prompt_tokens"], tokens.reasoning + tokens.content + tokens.discarded
        return {
            **head,
            "status": "completed" if answer.ended else "incomplete",
            "incomplete_details": None if answer.ended else {"reason": "max_output_tokens"},
            "output": [*_items(head["id"], texts)],
            "usage": {
                "input_tokens": prompt,
                "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
                "output_tokens": drawn,
                "output_tokens_details": {
                    "reasoning_tokens": tokens.reasoning + tokens.discarded,
                    "discarded_tokens": tokens.discarded,
                },
                "total_tokens": prompt + drawn,
            },
            "llava_cot": {"trace_id": head["id"], **described(answer)},
        }


class Events:
    """Numbers the events of one stream."""

    def __init__(self) -> None:
        self._number = 0

    def make(self, kind: str, **fields: Any) -> dict[str, str]:
        """Return one event, as the response of the stream sends it."""
        data = {"type": kind, "sequence_number": self._number, **fields}
        self._number += 1
        return {"event": kind, "data": to_json(data)}


class Parts:
    """Makes the events of the two items of a reply: its reasoning, and its message."""

    def __init__(self, events: Events, head: dict[str, Any]) -> None:
        self._events, self._id = events, head["id"]
        self._texts = {"reasoning": "", "content": ""}
        self._open: str | None = None
        self._closed: list[str] = []

    def add(self, delta: dict[str, str]) -> Iterator[dict[str, str]]:
        """Yield the events that a delta of a chat stream brings."""
        kind = "content" if "content" in delta else "reasoning"
        if kind in self._closed:
            return
        if self._open != kind:
            yield from self.close()
            self._open = kind
            yield self._events.make(
                "response.output_item.added", output_index=self._index, item=self._item("in_progress")
            )
            if kind == "content":
                part = {"type": "output_text", "text": "", "annotations": []}
                yield self._events.make("response.content_part.added", part=part, **self._place)
        self._texts[kind] += delta[kind]
        name = "response.output_text.delta" if kind == "content" else "response.reasoning_text.delta"
        more: dict[str, Any] = {"logprobs": []} if kind == "content" else {}
        yield self._events.make(name, delta=delta[kind], **self._place, **more)

    def close(self) -> Iterator[dict[str, str]]:
        """Yield the events that end the item that is open."""
        if self._open is None:
            return
        text = self._texts[self._open]
        if self._open == "content":
            yield self._events.make("response.output_text.done", text=text, logprobs=[], **self._place)
            part = {"type": "output_text", "text": text, "annotations": []}
            yield self._events.make("response.content_part.done", part=part, **self._place)
        else:
            yield self._events.make("response.reasoning_text.done", text=text, **self._place)
        yield self._events.make("response.output_item.done", output_index=self._index, item=self._item("completed"))
        self._closed.append(self._open)
        self._open = None

    @property
    def _index(self) -> int:
        return len(self._closed)

    @property
    def _place(self) -> dict[str, Any]:
        assert self._open is not None
        return {"item_id": _item_id(self._id, self._open), "output_index": self._index, "content_index": 0}

    def _item(self, status: str) -> dict[str, Any]:
        assert self._open is not None
        text = self._texts[self._open] if status == "completed" else ""
        return _item(self._id, self._open, text, status)


def _texts(answer: Answer) -> Texts:
    return texts_of(answer.grammar, answer.text, ended=answer.ended)


def _items(id: str, texts: Texts) -> Iterator[dict[str, Any]]:
    if texts.reasoning:
        yield _item(id, "reasoning", texts.reasoning, "completed")
    yield _item(id, "content", texts.content, "completed")


def _item(id: str, kind: str, text: str, status: str) -> dict[str, Any]:
    own = {"id": _item_id(id, kind), "status": status}
    if kind == "reasoning":
        reasoning = [{"type": "reasoning_text", "text": text}] if text else []
        return {"type": "reasoning", "summary": [], "content": reasoning, **own}
    content = [{"type": "output_text", "text": text, "annotations": []}] if text else []
    return {"type": "message", "role": "assistant", "content": content, **own}


def _item_id(id: str, kind: str) -> str:
    return f"{'rs' if kind == 'reasoning' else 'msg'}_{id.removeprefix('resp-')}"
