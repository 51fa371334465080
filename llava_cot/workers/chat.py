"""Chat with a local model as with an endpoint, for ``llava-cot annotate --workers``."""

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llava_cot.data.annotation.client import Reply
from llava_cot.data.annotation.cost import Usage
from llava_cot.data.annotation.prompts import Message
from llava_cot.endpoint import EndpointError, RequestFailed
from llava_cot.workers.names import check_workers
from llava_cot.workers.served import Served
from llava_cot.workers.task import ModelSettings, Task

if TYPE_CHECKING:
    from llava_cot.workers.ray import RayWorkers


class InProcess:
    """A model in this process.

    Raises:
        ValueError, TypeError: naming the setting that is wrong.
    """

    def __init__(self, settings: ModelSettings) -> None:
        self._served = Served(settings)
        if self._served.error is not None:
            raise self._served.error
        self.answer = self._served.answer

    def close(self) -> None:
        """There is nothing to give back."""


def open_chat(workers: str, settings: ModelSettings, in_flight: int) -> "WorkerChat":
    """Load the models of workers that were described as "local" or "ray:N", to chat with."""
    check_workers(workers)
    if workers == "local":
        return WorkerChat(settings.model, InProcess(settings))
    from llava_cot.workers.ray import RayWorkers

    return WorkerChat(settings.model, RayWorkers(settings, int(workers.removeprefix("ray:")), in_flight))


class WorkerChat:
    """Has the methods of ``llava_cot.data.annotation.client.ChatClient``, and asks workers.

    A server's pace, time limit and retries have no meaning here. A format that is asked for is not enforced.
    """

    def __init__(self, model: str, workers: "InProcess | RayWorkers") -> None:
        self._model, self._workers = model, workers

    async def close(self) -> None:
        self._workers.close()

    async def ask(self, messages: Sequence[Message], usage: Usage, expected: int = 0, **options: Any) -> Reply:
        """Return the reply and add its cost to ``usage``. A request without a seed gets a random one.

        Raises:
            RequestFailed: the model could not answer.
            EndpointError: a worker can't be started.
        """
        seed = options.get("seed")
        images = [part["image_url"]["url"] for message in messages for part in _parts(message) if "image_url" in part]
        chat = [{"role": message["role"], "content": [*map(_shown, _parts(message))]} for message in messages]
        task = Task(("", 0), chat, tuple(images), random.getrandbits(62) if seed is None else seed)
        usage.requests += 1
        try:
            found = await self._workers.answer(task)
        except Exception as error:
            raise EndpointError(f"a worker can't be started: {error}") from error
        if isinstance(found, Exception):
            raise RequestFailed(str(found))
        usage.add(Usage(0, found.usage["prompt_tokens"], found.usage["generated_tokens"]))
        return Reply(found.text, "", not found.ended, self._model)


def _parts(message: Message) -> list[dict[str, Any]]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _shown(part: dict[str, Any]) -> dict[str, Any]:
    return {"type": "image"} if "image_url" in part else part
