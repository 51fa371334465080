"""``POST /v1/chat/completions``: whole replies and streams."""

import json
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from llava_cot.answer import Answer
from llava_cot.search.events import Candidates, Event, Retrace, StageFinal, TextDelta
from llava_cot.search.run import SearchRun
from llava_cot.serve.errors import RequestError
from llava_cot.serve.intake import Intake, Work
from llava_cot.serve.metrics import Measured, Metrics
from llava_cot.serve.reply import Texts, Tokens, described, logprobs_of, texts_in, texts_of, total, usage_of
from llava_cot.serve.running import answers, follow
from llava_cot.serve.schema import ChatRequest
from llava_cot.stages import Grammar
from llava_cot.trace.writer import to_json

EVENT_NAMES = {Candidates: "candidates", Retrace: "retrace", StageFinal: "stage_final", TextDelta: "text_delta"}


class Chat:
    """Answers chat requests that are already checked."""

    def __init__(self, intake: Intake, metrics: Metrics) -> None:
        self._generator, self._metrics, self._name = intake.generator, metrics, intake.presets.name

    async def reply(self, request: ChatRequest, work: Work) -> dict[str, Any]:
        """Return the body of the reply."""
        id = new_id("chatcmpl")
        with self._metrics.request(work.plan.name) as measured:
            found = await answers(self._generator, work)
            measured.done(found)
        parts = [self._split(request, answer) for answer in found]
        tokens = [self._tokens(answer, texts) for answer, texts in zip(found, parts)]
        return {
            **self._head(id, "chat.completion", work),
            "choices": [self._choice(request, index, *pair) for index, pair in enumerate(zip(found, parts))],
            "usage": usage_of(found, tokens),
            "llava_cot": self._extension(request, id, found),
        }

    async def stream(self, request: ChatRequest, work: Work) -> AsyncGenerator[str, None]:
        """Yield the data of each server-sent event. An error after the first one is an event too."""
        id = new_id("chatcmpl")
        head = self._head(id, "chat.completion.chunk", work)
        wants_html = request.llava_cot.trace == "html"
        try:
            for index in range(len(work.seeds)):
                yield _data(head, index, {"role": "assistant", "content": ""})
            with self._metrics.request(work.plan.name) as measured:
                found: list[Answer | None] = [None] * len(work.seeds)
                shown = [Shown(stops_of(request), self._generator.grammar) for _ in work.seeds]
                items = follow(self._generator, work, self._look if wants_html else lambda run: None)
                async for index, item, html in narrated(items, shown, measured, partial(self._split, request)):
                    if isinstance(item, dict):
                        yield _data(head, index, item)
                    elif isinstance(item, Answer):
                        found[index] = item
                        yield self._last(request, head, index, item)
                    else:
                        progress: dict[str, Any] = {"event": {"index": index, **named(item)}}
                        if html is not None:
                            progress["html"] = html
                        yield to_json({**head, "choices": [], "llava_cot": progress})
                done = [answer for answer in found if answer is not None]
                measured.done(done)
            yield to_json({**head, "choices": [], "llava_cot": self._extension(request, id, done)})
            if request.stream_options and request.stream_options.include_usage:
                tokens = [self._tokens(answer, self._split(request, answer)) for answer in done]
                yield to_json({**head, "choices": [], "usage": usage_of(done, tokens)})
            yield "[DONE]"
        except RequestError as error:
            yield json.dumps(error.body)

    def _head(self, id: str, kind: str, work: Work) -> dict[str, Any]:
        return {"id": id, "object": kind, "created": int(time.time()), "model": work.model}

    def _split(self, request: ChatRequest, answer: Answer) -> Texts:
        texts = texts_of(answer.grammar, answer.text, ended=answer.ended)
        return Texts(texts.reasoning, cut(texts.content, stops_of(request)))

    def _tokens(self, answer: Answer, texts: Texts) -> Tokens:
        return Tokens.of(answer, texts.content, self._generator.vocabulary.token_bytes)

    def _choice(self, request: ChatRequest, index: int, answer: Answer, texts: Texts) -> dict[str, Any]:
        reasoning = texts.reasoning or None
        message = {
            "role": "assistant",
            "content": texts.content,
            "reasoning": reasoning,
            "reasoning_content": reasoning,
        }
        choice = {"index": index, "message": message, **self._end(request, answer)}
        if request.return_token_ids:
            choice["token_ids"] = answer.tokens
        return choice

    def _last(self, request: ChatRequest, head: dict[str, Any], index: int, answer: Answer) -> str:
        return to_json({**head, "choices": [{"index": index, "delta": {}, **self._end(request, answer)}]})

    def _end(self, request: ChatRequest, answer: Answer) -> dict[str, Any]:
        logprobs = logprobs_of(answer, self._generator.vocabulary.token_bytes) if request.logprobs else None
        return {"finish_reason": reason_of(answer), "logprobs": logprobs}

    def _look(self, run: SearchRun) -> str:
        return self._generator.trace_of(run, None).to_fragment()

    def _extension(self, request: ChatRequest, id: str, found: Sequence[Answer]) -> dict[str, Any]:
        """Return the ``llava_cot`` object of a reply: that of its first answer, and those of all under "choices"."""
        wanted = request.llava_cot.trace
        if wanted == "none":
            return {"trace_id": id}
        parts = [described(answer) for answer in found]
        for part, answer in zip(parts, found):
            if wanted == "full":
                part["trace"] = {**answer.trace.data, "model": self._name}
            elif wanted == "html":
                part["html"] = answer.trace.to_fragment()
                part["trace"] = {**answer.trace.data, "model": self._name}
        more = {"choices": parts, "usage": total(found)} if len(parts) > 1 else {}
        return {"trace_id": id, **parts[0], **more}


class Shown:
    """What a stream has shown of one answer. Text that was shown is never taken back."""

    def __init__(self, stops: Sequence[str], grammar: Grammar) -> None:
        self._stops, self._grammar = stops, grammar
        self._beginnings = {mark[:end] for mark in (*grammar.all_tags, *stops) for end in range(1, len(mark))}
        self._longest = max(map(len, self._beginnings), default=0)
        self._text, self._reasoning, self._content = "", "", ""

    def add(self, text: str) -> list[dict[str, str]]:
        """Return the deltas that new text of the model brings. What may still become a tag is held back."""
        self._text += text
        certain = self._text[: len(self._text) - self._held()]
        stages = self._grammar.parse(certain, ended=False)
        if all(not part.text for part in stages.values()):
            return []  # nothing says yet whether the model writes stages at all
        texts = texts_in(self._grammar, certain, stages)
        return self.up_to(Texts(texts.reasoning, cut(texts.content, self._stops)))

    def up_to(self, texts: Texts) -> list[dict[str, str]]:
        """Return the deltas between what was shown and ``texts``."""
        deltas = []
        if texts.reasoning.startswith(self._reasoning) and (new := texts.reasoning[len(self._reasoning) :]):
            deltas.append({"reasoning": new, "reasoning_content": new})
            self._reasoning = texts.reasoning
        if texts.content.startswith(self._content) and (new := texts.content[len(self._content) :]):
            deltas.append({"content": new})
            self._content = texts.content
        return deltas

    def _held(self) -> int:
        """Return how many characters at the end of the text may be the beginning of a tag or of a stop."""
        lengths = range(min(self._longest, len(self._text)), 0, -1)
        return next((length for length in lengths if self._text[-length:] in self._beginnings), 0)


Told = tuple[int, Event | Answer | dict[str, str], str | None]


async def narrated(
    items: AsyncGenerator[Told, None], shown: Sequence[Shown], measured: Measured, split: Callable[[Answer], Texts]
) -> AsyncGenerator[Told, None]:
    """Yield the items of ``follow``, each after the deltas that its text brings."""
    async for index, item, html in items:
        deltas: list[dict[str, str]] = []
        if isinstance(item, TextDelta):
            measured.first_token()
            deltas = shown[index].add(item.text)
        elif isinstance(item, Answer):
            deltas = shown[index].up_to(split(item))
        for delta in deltas:
            yield index, delta, None
        yield index, item, html


def named(event: Event) -> dict[str, Any]:
    """Return an event as JSON, with its type."""
    return {"type": EVENT_NAMES[type(event)], **asdict(event)}


def stops_of(request: ChatRequest) -> tuple[str, ...]:
    """Return the strings at which the content ends, without them."""
    return (request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ())


def cut(text: str, stops: Sequence[str]) -> str:
    """Return ``text`` up to the first of ``stops``."""
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


def reason_of(answer: Answer) -> str:
    return "stop" if answer.ended else "length"


def new_id(prefix: str) -> str:
    return f"{prefix}-{uuid.uuid4().hex}"


def _data(head: dict[str, Any], index: int, delta: dict[str, str]) -> str:
    return to_json({**head, "choices": [{"index": index, "delta": delta, "finish_reason": None, "logprobs": None}]})
