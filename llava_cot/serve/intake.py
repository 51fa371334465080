"""Turn a request into the work that answers it, and check it against the server's limits before anything is queued."""

import asyncio
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from PIL import Image

from llava_cot.generator import SwiresGenerator
from llava_cot.question import Question, check_question
from llava_cot.scoring import SCORERS, Scorer
from llava_cot.search import Budget, Plan
from llava_cot.search.plan import settings_of
from llava_cot.serve.errors import RequestError, as_request_error
from llava_cot.serve.held import Holding
from llava_cot.serve.images import ImageReader
from llava_cot.serve.limits import Limits
from llava_cot.serve.presets import PLAIN, Presets
from llava_cot.serve.schema import ChatRequest, Effort, ImagePart, Message, Request

OWN = ("budget", "grammar", "scorer", "max_new_tokens", "num_return_sequences")  # settings that have a field elsewhere
SAMPLING = ("temperature", "top_p", "top_k", "min_p")


@dataclass(frozen=True)
class Work:
    """One request, ready to run: a search for each of ``seeds``."""

    model: str
    plan: Plan
    question: Question
    images: Sequence[Image.Image]
    seeds: tuple[int, ...]
    field: str  # of the request, that has its conversation


@dataclass(frozen=True)
class Conversation:
    """The messages of a request, in the terms of the chat API, and where they stand in the request, for errors."""

    messages: Sequence[Message]
    field: str  # that has all of them
    fields: Sequence[str]  # that of each message
    url: str  # of an image, in its part

    def named(self, error: str) -> str:
        """Return the text of an error of ``check_question`` by the request's own names."""
        return re.sub(
            r"question(?:\[(\d+)\])?", lambda at: self.fields[int(at[1])] if at[1] else self.field, error, count=1
        )


@dataclass(frozen=True)
class Asked:
    """What a request says in any of the APIs, in the terms of the chat API."""

    request: Request
    conversation: Conversation
    n: int
    max_new_tokens: int | None
    max_name: str  # what the API calls that
    effort: Effort | None


class Intake:
    """Checks requests, and makes ``Work`` of them."""

    def __init__(
        self,
        generator: SwiresGenerator,
        presets: Presets,
        limits: Limits,
        images: ImageReader,
        scorers: Mapping[str, Scorer],
        scorer: str | None,
    ) -> None:
        self.generator, self.presets, self.limits, self._images = generator, presets, limits, images
        self._scorers: dict[str, str | Scorer] = {**{name: name for name in SCORERS}, **scorers}
        self._default_scorer = scorer
        if scorer is not None and scorer not in self._scorers:
            raise ValueError(f"scorer must be one of {sorted(self._scorers)}, got {scorer!r}")

    async def work(self, asked: Asked, holding: Holding) -> Work:
        """Return the work of a request, whose images ``holding`` counts.

        Raises:
            RequestError: it is wrong, or asks for more than a limit allows. The error names the field.
        """
        question, urls = self.conversation(asked.conversation)
        plan = self.plan(asked, has_images=bool(urls))
        await self.count(question, asked.conversation.field, answers=asked.n)
        seeds = self.seeds(asked.request.seed, asked.n)
        return Work(
            asked.request.model, plan, question, await self.load(urls, holding), seeds, asked.conversation.field
        )

    async def count(
        self, question: list[dict[str, Any]], field: str, *, answers: int = 1, turns: Sequence[str] = ()
    ) -> list[tuple[int, ...]]:
        """Check how many tokens of text a request makes the model read, and return those of ``turns``.

        The conversation is read once for each of ``answers``, and ``turns`` of the user once after it.

        Raises:
            RequestError: they are too many, or a text can't be read.
        """
        text = "\n".join(part["text"] for message in question for part in message["content"] if "text" in part)

        def read() -> tuple[int, list[tuple[int, ...]]]:  # it takes 0.1 s for the longest text
            tokens = self.generator.prompt([], text)["input_ids"].shape[1]
            return tokens, [tuple(self.generator.turn_tokens(turn, ())) for turn in turns]

        try:
            tokens, found = await asyncio.to_thread(read)
        except Exception as error:
            raise as_request_error(error, field) from error
        total = answers * tokens + sum(map(len, found))
        if total > self.limits.max_read_tokens:
            after = f" and {len(turns)} questions" if turns else f", read for n={answers} answers,"
            message = f"{field}{after} must have at most {self.limits.max_read_tokens} tokens of text, got {total}"
            raise RequestError(400, message, field, "context_length_exceeded")
        return found

    async def load(self, urls: Sequence[tuple[str, str]], holding: Holding) -> list[Image.Image]:
        """Return the images of these fields and URLs, which ``holding`` counts."""
        return await self._images.read(urls, holding)

    def close(self) -> None:
        """End the threads that read images."""
        self._images.close()

    def conversation(self, asked: Conversation) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
        """Return the messages as ``SwiresGenerator.answer`` takes them, and the field and the URL of each image."""
        limits, field = self.limits, asked.field
        within(field, len(asked.messages), 1, limits.max_messages)
        urls: list[tuple[str, str]] = []
        found, characters = [], 0
        for message, name in zip(asked.messages, asked.fields):
            parts: list[dict[str, str]] = []
            for place, part in enumerate([message.content] if isinstance(message.content, str) else message.content):
                if isinstance(part, ImagePart):
                    if message.role != "user":
                        raise RequestError(
                            400, f"{field} must have images of the user alone, got {message.role}", field
                        )
                    urls.append((f"{name}.content[{place}].{asked.url}", part.image_url.url))
                    parts.append({"type": "image"})
                else:
                    text = part if isinstance(part, str) else part.text
                    characters += len(text)
                    parts.append({"type": "text", "text": text})
            role = "system" if message.role == "developer" else message.role
            found.append({"role": role, "content": parts})
        within(f"the text of {field}", characters, 1, limits.max_text)
        within(f"the images of {field}", len(urls), 0, limits.max_images)
        try:
            check_question(found)
        except ValueError as error:
            raise RequestError(400, asked.named(str(error)), field) from None
        return found, urls

    def plan(self, asked: Asked, *, has_images: bool) -> Plan:
        """Return the checked plan of the search that a request asks for.

        Front ends send requests for titles and tags to the model of the conversation. Those have no image, so a request
        without one is answered greedily, unless it names its search itself.
        """
        request, limits = asked.request, self.limits
        extension = request.llava_cot
        search, settings, is_named = self.presets.resolve(request.model, asked.effort, extension.search)
        known = settings_of(search)
        sampling = {name: value for name in SAMPLING if (value := getattr(request, name)) is not None}
        if not has_images and not is_named and search not in PLAIN:
            search, settings, sampling, known = "greedy", {}, {}, settings_of("greedy")
        elif not set(sampling) <= set(known) and set(sampling.values()) <= {0, 1}:
            sampling = {}  # a temperature of 0 and a top_p of 1 say what the search does anyway
        for name in extension.settings:
            if name in OWN:
                raise RequestError(
                    400,
                    f"llava_cot.settings must not have {name!r}, which has a field of its own",
                    "llava_cot.settings",
                )
        given = {**settings, **sampling, **extension.settings}
        within("n", asked.n, 1, limits.max_n)
        most = asked.max_new_tokens
        if most is not None:
            within(asked.max_name, most, 1, limits.max_new_tokens)
        given["max_new_tokens"] = most or limits.max_new_tokens
        scorer = extension.scorer or (self._default_scorer if "scorer" in known else None)
        if scorer is not None:
            if scorer not in self._scorers:
                message = f"llava_cot.scorer must be one of {sorted(self._scorers)}, got {scorer!r}"
                raise RequestError(400, message, "llava_cot.scorer")
            given["scorer"] = self._scorers[scorer]
        given["budget"] = self.budget(extension.budget, asked.n)
        try:
            plan = self.generator.plan_of_stream(search, **given)
        except (ValueError, TypeError) as error:
            raise RequestError(400, str(error), _field_in(str(error), asked)) from None
        # Each round draws a candidate at least. The bound on all of them takes a time that grows with the rounds.
        rounds = getattr(plan.config, "max_rounds", 1)
        within("llava_cot.settings.max_rounds", rounds, 1, limits.max_generations)
        # A search without a bound draws at most ``candidates`` at a time; its budget ends it.
        drawn = plan.config.max_generations or getattr(plan.config, "candidates", None) or 1
        within("llava_cot.settings must ask for", drawn * asked.n, 1, limits.max_generations, "candidates x rounds x n")
        return plan

    def budget(self, given: Mapping[str, float], n: int) -> Budget:
        """Return the budget of each of ``n`` searches: what a request gives, and the server's limits for the rest."""
        limits, names = self.limits, [field.name for field in fields(Budget)]
        caps = {
            "generated_tokens": limits.max_tokens // n,
            "seconds": limits.max_seconds,
            "generations": limits.max_generations // n + 1,  # which no search with a bound reaches
        }
        for name, value in given.items():
            if name not in names:
                raise RequestError(400, f"llava_cot.budget must have keys of {names}, got {name!r}", "llava_cot.budget")
            if name in caps and value > caps[name]:
                message = f"llava_cot.budget.{name} must be at most {caps[name]}, got {value}"
                raise RequestError(400, message, "llava_cot.budget")
        try:
            return Budget(**{**caps, **given})  # type: ignore[arg-type]
        except (ValueError, TypeError) as error:
            message = f"llava_cot.budget.{str(error).removeprefix('budget.')}"
            raise RequestError(400, message, "llava_cot.budget") from None

    def seeds(self, seed: int | None, n: int) -> tuple[int, ...]:
        """Return the seed of each answer: those that follow the given one, or a random one."""
        if seed is None:
            seed = random.getrandbits(62)
        elif not 0 <= seed < 2**63 - n:
            raise RequestError(400, f"seed must be in [0, 2**63 - n), got {seed}", "seed")
        return tuple(range(seed, seed + n))


def asked_in_chat(request: ChatRequest) -> Asked:
    """Read a chat request."""
    if request.max_tokens is not None and request.max_completion_tokens is not None:
        raise RequestError(400, "max_tokens and max_completion_tokens must not both be given", "max_tokens")
    most = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
    name = "max_completion_tokens" if request.max_tokens is None else "max_tokens"
    return Asked(request, chat_conversation(request.messages), request.n, most, name, request.reasoning_effort)


def chat_conversation(messages: Sequence[Message]) -> Conversation:
    """Return the messages of a chat request as a conversation."""
    return Conversation(messages, "messages", [f"messages[{at}]" for at in range(len(messages))], "image_url.url")


def within(name: str, value: float, least: float, most: float, unit: str = "") -> None:
    """Raise ``RequestError`` unless ``least <= value <= most``."""
    if not least <= value <= most:
        words = f"{name} must be" if "must" not in name else name
        unit = f" {unit}" if unit else ""
        param = name.removeprefix("the text of ").removeprefix("the images of ").split(" ")[0]
        raise RequestError(400, f"{words} from {least} to {most}{unit}, got {value}", param)


def _field_in(message: str, asked: Asked) -> str | None:
    """Return the field of the request that the first word of an error names, if it names one."""
    word = message.partition(" ")[0].partition("[")[0]
    if word == "max_new_tokens":
        return asked.max_name
    return f"llava_cot.settings.{word}" if word in asked.request.llava_cot.settings else word or None
