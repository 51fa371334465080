"""Send one chat request: pace it, time it out, retry it if that can help, and account for it."""

import asyncio
import json
import os
import random
import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, Protocol

from llava_cot.data.annotation.cost import ANNOTATION_TOKENS, Usage, prompt_tokens, text_tokens
from llava_cot.data.annotation.pace import Pace
from llava_cot.data.annotation.prompts import Message

FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0  # seconds
RETRIED = (408, 409, 425, 429)  # and everything from 500 on


class EndpointError(ValueError):
    """The endpoint accepts no request, so the run stops."""


class RequestFailed(Exception):
    """The request failed after all its tries."""


class RequestRefused(RequestFailed):
    """The endpoint says that the request is wrong (400 or 422)."""


class _TryAgain(Exception):
    def __init__(self, why: str, wait: float | None = None) -> None:
        super().__init__(why)
        self.wait = wait


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
        try:
            import openai
        except ImportError:
            raise ValueError("a chat endpoint needs the openai package: pip install 'llava-cot[annotate]'") from None
        key = os.environ.get("OPENAI_API_KEY")
        if not key:
            raise ValueError("OPENAI_API_KEY must be set (to anything, for a server without keys), got none")
        # Retries are done here, because the client's own know neither the pace nor that the run is stopping.
        self._client = openai.AsyncOpenAI(api_key=key, base_url=base_url, max_retries=0, timeout=timeout)
        self._timeout, self._max_retries, self._image_tokens = timeout, max_retries, image_tokens
        self._options, self._requests, self._tokens = options, Pace(rpm), Pace(tpm)

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
        await self._client.close()

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
        for failures in range(self._max_retries + 1):
            try:
                return await self._try(messages, usage, expected, options)
            except _TryAgain as error:
                if failures == self._max_retries:
                    raise RequestFailed(f"{error}, {failures + 1} tries") from None
                back_off = min(LONGEST_WAIT, FIRST_WAIT * 2**failures)
                if error.wait is not None:
                    self._requests.hold(error.wait)
                # The jitter spreads requests that failed together. It never goes below the time that the server named.
                await asyncio.sleep(max(error.wait or 0, back_off / 2) + random.uniform(0, back_off / 2))
        raise AssertionError("the last try returns or raises")

    async def _try(self, messages: list[Message], usage: Usage, expected: int, options: dict[str, Any]) -> Reply:
        import openai

        prompt = prompt_tokens(messages, self._image_tokens)
        await self._tokens.wait(prompt + expected)
        await self._requests.wait()
        usage.requests += 1
        try:
            async with asyncio.timeout(self._timeout):  # the client's own limit is per read, not for the whole
                create: Any = self._client.chat.completions.with_raw_response.create
                response = await create(messages=messages, **{**self._options, **options})
            reply, spent = _read(response.content, prompt)
        except (openai.APITimeoutError, TimeoutError):
            raise _TryAgain(f"no reply within {self._timeout:g} s") from None
        except openai.APIConnectionError as error:
            raise _TryAgain(f"no connection: {error.__cause__ or error}") from None
        except openai.APIStatusError as error:
            raise _failure(error) from None
        usage.add(spent)
        self._tokens.correct(spent.prompt_tokens + spent.completion_tokens - prompt - expected)
        if reply is None:
            raise _TryAgain(f"the reply is not a chat completion: {response.content[:200]!r}")
        return reply


def _failure(error: Any) -> Exception:
    """Return the error that an HTTP status other than 2xx means for the request."""
    why = f"HTTP {error.status_code}: {error.message}"
    if error.status_code in (401, 403, 404) or error.code == "insufficient_quota":
        return EndpointError(f"the endpoint refuses the key, the model or the account: {why}")
    if error.status_code in (400, 422):
        return RequestRefused(why)
    if error.status_code in RETRIED or error.status_code >= 500:
        return _TryAgain(why, _retry_after(error.response.headers.get("retry-after")))
    return RequestFailed(why)


def _retry_after(header: str | None) -> float | None:
    """Return the seconds of a header that has seconds or a date, and None for any other."""
    if header is None:
        return None
    try:
        return max(0.0, min(float(header), 86400.0))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    except ValueError:
        return None


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
