"""A server of OpenAI's protocol as the back end of searches."""

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llava_cot.backends.openai.loop import LoopThread
from llava_cot.backends.openai.session import Session, Work
from llava_cot.backends.openai.wire import Kind, Prefix, Reply, options_of, read_reply
from llava_cot.core import Feature, SamplingParams
from llava_cot.endpoint import Endpoint, EndpointError, RequestFailed

CHARACTERS_PER_TOKEN = 4  # approximately, for the pace alone; the server's own count replaces the estimate


class RemoteError(ConnectionError):
    """A server did not answer a request. The message says what was asked, and what came back."""


class Server:
    """Runs sessions on one model of a server. ``probe.connect`` makes one.

    ``features`` are what the server was seen to do; ``tags`` are the strings that may end a continuation.
    """

    eos_token_ids: frozenset[int] = frozenset()  # nothing that runs here reads tokens

    def __init__(self, loop: LoopThread, endpoint: Endpoint, base_url: str, model: str, kind: Kind) -> None:
        self.loop, self.endpoint, self.base_url, self.model, self.kind = loop, endpoint, base_url, model, kind
        self.features: frozenset[Feature] = frozenset()
        self.tags: Sequence[str] = ()
        self._changed = threading.Condition()
        self._changes = 0
        self._seen = threading.local()

    def open(self, prompt: Callable[[], list[dict[str, Any]]]) -> Session:
        """Open a session on the messages that ``prompt`` makes once the session is asked.

        Keep the session: when nobody refers to it any more, its requests are cancelled.
        """
        return Session(Work(self, prompt))

    def notify(self) -> None:
        """Wake up whoever waits in ``step``."""
        with self._changed:
            self._changes += 1
            self._changed.notify_all()

    def step(self) -> bool:
        """Wait until a search has come further since this thread last looked, for a second at most."""
        with self._changed:
            self._changed.wait_for(lambda: self._changes != getattr(self._seen, "changes", None), 1.0)
            self._seen.changes = self._changes
        return True

    def run_until(self, is_done: Callable[[], bool]) -> None:
        """Wait until ``is_done()``. Searches go on whether somebody waits or not."""
        while not is_done():
            self.step()

    def close(self) -> None:
        """Cancel all requests, end what waits for them with an error, and close the connection."""
        self.loop.close(self.endpoint.close)
        self.notify()

    async def send(
        self,
        messages: Sequence[Mapping[str, Any]],
        prefix: Prefix,
        seeds: Sequence[int],
        params: SamplingParams,
        max_tokens: int,
        stops: Sequence[str],
    ) -> Reply:
        """Ask for one continuation of ``prefix`` for each of ``seeds``.

        Raises:
            RemoteError: no reply came, or one that can't be read.
        """
        wanted = {"logprobs": Feature.LOGPROBS in self.features, "token_ids": Feature.TOKEN_IDS in self.features}
        options = options_of(self.kind, self.model, messages, prefix, seeds, params, max_tokens, stops, **wanted)
        return await self.post(options, stops, len(seeds), max_tokens)

    async def post(self, options: dict[str, Any], stops: Sequence[str], number: int, max_tokens: int) -> Reply:
        """Send a chat request for ``number`` choices. Raises ``RemoteError``."""

        def read(body: bytes) -> tuple[Reply | None, float]:
            reply = read_reply(body, stops, number)
            return reply, reply.prompt_tokens + reply.completion_tokens if reply else 0

        texts = [message["content"] for message in options["messages"]]
        characters = sum(len(text) if isinstance(text, str) else 0 for text in texts)
        expected = characters / CHARACTERS_PER_TOKEN + number * max_tokens
        try:
            return await self.endpoint.chat(options, expected, read)
        except (EndpointError, RequestFailed) as error:
            last = options["messages"][-1]
            what = "to continue" if last["role"] == "assistant" else "to begin"
            asked = f"{what} a reply by {number} x {max_tokens} tokens with model {self.model!r}"
            raise RemoteError(f"{self.base_url} was asked {asked}, but {error}") from error
