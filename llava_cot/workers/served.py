"""A model that answers tasks for asyncio callers, in an actor's process or in this one."""

import os

from llava_cot.workers.local import load, reply_of
from llava_cot.workers.task import ModelSettings, Reply, Task

CUDA_ERRORS = ("AcceleratorError", "OutOfMemoryError")  # after the first, a process can't use its GPU any more


class Served:
    """All its tasks share forward passes. A model that can't be loaded is told by ``ready``, and not raised.

    Args:
        has_process: whether this process is its own. Then it exits when the GPU can't be used any more.
    """

    def __init__(self, settings: ModelSettings, has_process: bool = False) -> None:
        self.error: Exception | None = None
        self._has_process = has_process
        try:
            self._generator, self._plan = load(settings)
        except Exception as error:
            self.error = _plain(error)

    async def ready(self) -> Exception | None:
        """What went wrong in loading the model, if anything."""
        return self.error

    async def answer(self, task: Task) -> Reply | Exception:
        """The reply to a task, or what went wrong."""
        try:
            run = self._generator.submit(list(task.images), task.question, self._plan, seed=task.seed)
            await self._generator.aio.engine.run(run)
            return reply_of(self._generator.answer_of(run))
        except Exception as error:
            if self._has_process and type(error).__name__ in CUDA_ERRORS:
                os._exit(1)
            return _plain(error)


def _plain(error: Exception) -> Exception:
    """An error that another process can read: bad input stays bad input."""
    for kind in (ValueError, TypeError):
        if isinstance(error, kind):
            return kind(str(error))
    return RuntimeError(f"{type(error).__name__}: {error}")
