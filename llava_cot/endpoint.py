"""Send requests to a server of OpenAI's protocol: pace them, time them out, and retry them if that can help."""

import asyncio
import random
import time
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

from llava_cot.pace import Pace

FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0  # seconds
RETRIED = (408, 409, 425, 429)  # and everything from 500 on

Reply = TypeVar("Reply")


class EndpointError(ValueError):
    """The endpoint accepts no request: the key, the model or the account is refused."""


class RequestFailed(Exception):
    """The request failed after all its tries."""


class RequestRefused(RequestFailed):
    """The endpoint says that the request is wrong (400 or 422)."""


class _TryAgain(Exception):
    def __init__(self, why: str, wait: float | None = None) -> None:
        super().__init__(why)
        self.wait = wait


class Endpoint:
    """A server of OpenAI's protocol. All requests of one endpoint share its pace.

    Args:
        timeout: the limit of one try in seconds, from sending to the last byte.
        max_retries: the most tries after the first one of a request.
        rpm: requests a minute at most, or None for no limit.
        tpm: tokens a minute at most, or None for no limit.

    Raises:
        ValueError: the openai package is missing.
    """

    def __init__(
        self,
        base_url: str | None,
        api_key: str,
        *,
        timeout: float,
        max_retries: int,
        rpm: float | None,
        tpm: float | None,
    ) -> None:
        try:
            import openai
        except ImportError:
            raise ValueError("an endpoint needs the openai package: pip install openai") from None
        # Retries are done here, because the client's own know neither the pace nor that the run is stopping.
        self._client = openai.AsyncOpenAI(api_key=api_key, base_url=base_url, max_retries=0, timeout=timeout)
        self._timeout, self._max_retries = timeout, max_retries
        self._requests, self._tokens = Pace(rpm), Pace(tpm)

    async def close(self) -> None:
        await self._client.close()

    async def models(self) -> bytes:
        """Return the body of the list of models. Raises as ``chat``."""
        return await self._retried(lambda: self._send(self._client.models.with_raw_response.list()))

    async def chat(
        self,
        options: dict[str, Any],
        tokens: float,
        read: Callable[[bytes], tuple[Reply | None, float]],
        on_try: Callable[[], None] = lambda: None,
    ) -> Reply:
        """Send a chat completion and return what ``read`` makes of the body.

        Args:
            options: the fields of the request. Those that the openai package does not know are in ``extra_body``.
            tokens: how many tokens it takes, approximately: those of the prompt and of the reply.
            read: returns the reply, or None if the body has none, and how many tokens were taken after all.
            on_try: is called before each try.

        Raises:
            RequestRefused: 400 or 422.
            RequestFailed: it failed in another way, after all tries.
            EndpointError: the key, the model or the account is refused.
        """

        async def attempt() -> Reply:
            await self._tokens.wait(tokens)
            await self._requests.wait()
            on_try()
            create: Any = self._client.chat.completions.with_raw_response.create
            body = await self._send(create(**options))
            reply, taken = read(body)
            self._tokens.correct(taken - tokens)
            if reply is None:
                raise _TryAgain(f"the reply is not a chat completion: {body[:200]!r}")
            return reply

        return await self._retried(attempt)

    async def _retried(self, attempt: Callable[[], Any]) -> Any:
        for failures in range(self._max_retries + 1):
            try:
                return await attempt()
            except _TryAgain as error:
                if failures == self._max_retries:
                    raise RequestFailed(f"{error}, {failures + 1} tries") from None
                back_off = min(LONGEST_WAIT, FIRST_WAIT * 2**failures)
                if error.wait is not None:
                    self._requests.hold(error.wait)
                # The jitter spreads requests that failed together. It never goes below the time that the server named.
                await asyncio.sleep(max(error.wait or 0, back_off / 2) + random.uniform(0, back_off / 2))
        raise AssertionError("the last try returns or raises")

    async def _send(self, request: Any) -> bytes:
        """Await a request of the openai package and return the body of its response."""
        import openai

        try:
            async with asyncio.timeout(self._timeout):  # the client's own limit is per read, not for the whole
                return (await request).content
        except (openai.APITimeoutError, TimeoutError):
            raise _TryAgain(f"no reply within {self._timeout:g} s") from None
        except openai.APIConnectionError as error:
            raise _TryAgain(f"no connection: {error.__cause__ or error}") from None
        except openai.APIStatusError as error:
            raise _failure(error) from None


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
