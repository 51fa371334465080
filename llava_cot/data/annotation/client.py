"""Ask an endpoint in one chat request, and account for it."""

import json
import os
from dataclasses import dataclass
from typing import Any, Protocol

from llava_cot.data.annotation.cost import ANNOTATION_TOKENS, Usage, prompt_tokens, text_tokens
from llava_cot.data.annotation.prompts import Message
from llava_cot.endpoint import Endpoint


@dataclass(frozen=True)
class Reply:
    """The reply of the model. ``refusal`` is the text of a refusal or why the reply was withheld, and "" otherwise."""

    text: str
    refusal: str
    is_cut: bool  # whether it was cut at the limit of tokens
    model: str  # the name that the endpoint gives


class Chat(Protocol):
    """What annotation asks: an endpoint, or workers with a model of their own."""

    async def ask(
        self, messages: list[Message], usage: Usage, expected: int = ANNOTATION_TOKENS, **options: object
    ) -> Reply:
        """See ``ChatClient.ask``."""

    async def close(self) -> None:
        """Give everything back."""


class EndpointSettings(Protocol):
    """What ``ChatClient.of`` reads of the settings of annotation or of a judge."""

    @property
    def base_url(self) -> str | None: ...
    @property
    def timeout(self) -> float: ...
    @property
    def max_retries(self) -> int: ...
    @property
    def rpm(self) -> float | None: ...
    @property
    def tpm(self) -> float | None: ...
    @property
    def options(self) -> dict[str, Any]: ...


class ChatClient:
    """Chats with any server of OpenAI's chat completions protocol.

    Args:
        timeout: the limit of one try in seconds, from sending to the last byte.
        max_retries: the most tries after the first one of a request.
        options: options of every request, e.g. model and max_completion_tokens.
        image_tokens: the estimated tokens of an image, until the server reports the size of the prompt.

    Raises:
        ValueError: the openai package or OPENAI_API_KEY is missing.
    """

    def __init__(
        self,
        base_url: str | None,
        *,
        timeout: float,
        max_retries: int,
        rpm: float | None,
        tpm: float | None,
        options: dict[str, Any],
        image_tokens: int,
    ) -> None:
        key = os.environ.get("OPENAI_API_KEY")
        if not key:
            raise ValueError("OPENAI_API_KEY must be set (to anything, for a server without keys), got none")
        self._endpoint = Endpoint(base_url, key, timeout=timeout, max_retries=max_retries, rpm=rpm, tpm=tpm)
        self._options, self._image_tokens = options, image_tokens

    @classmethod
    def of(cls, settings: EndpointSettings, image_tokens: int) -> "ChatClient":
        """The client of an endpoint that settings describe."""
        return cls(
            settings.base_url,
            timeout=settings.timeout,
            max_retries=settings.max_retries,
            rpm=settings.rpm,
            tpm=settings.tpm,
            options=settings.options,
            image_tokens=image_tokens,
        )

    async def close(self) -> None:
        await self._endpoint.close()

    async def ask(
        self, messages: list[Message], usage: Usage, expected: int = ANNOTATION_TOKENS, **options: object
    ) -> Reply:
        """Return the reply and add its cost to ``usage``. ``expected`` is the approximate length of the reply in
        tokens.

        Raises:
            RequestRefused: 400 or 422.
            RequestFailed: it failed in another way, after all tries.
            EndpointError: the key, the model or the account is refused.
        """
        prompt = prompt_tokens(messages, self._image_tokens)

        def read(body: bytes) -> tuple[Reply | None, int]:
            reply, spent = _read(body, prompt)
            usage.add(spent)
            return reply, spent.prompt_tokens + spent.completion_tokens

        def count() -> None:
            usage.requests += 1

        sent = {"messages": messages, **self._options, **options}
        return await self._endpoint.chat(sent, prompt + expected, read, count)


def _read(body: bytes, prompt: int) -> tuple[Reply | None, Usage]:
    """Return the reply, or None if there is none, and its usage, which is an estimate if the server reports none."""
    try:
        data = json.loads(body)
    except (ValueError, RecursionError):
        return None, Usage()
    told = data.get("usage") if isinstance(data, dict) else None
    names = ("prompt_tokens", "completion_tokens")
    given = [told.get(name) for name in names] if isinstance(told, dict) else []
    counts = [count for count in given if isinstance(count, int) and count >= 0]
    is_told = len(counts) == len(names)
    spent = Usage(0, *counts) if is_told else Usage()
    try:
        choice = data["choices"][0]
        text, refusal = choice["message"].get("content") or "", choice["message"].get("refusal") or ""
        finish, model = choice.get("finish_reason"), data.get("model")
    except (KeyError, IndexError, TypeError, AttributeError):
        return None, spent
    if not isinstance(text, str) or not isinstance(refusal, str):
        return None, spent
    if finish == "content_filter":
        refusal = refusal or "withheld by the endpoint's content filter"
    if not is_told:
        spent = Usage(0, prompt, text_tokens(text))
    return Reply(text, refusal, finish == "length", model if isinstance(model, str) else ""), spent
