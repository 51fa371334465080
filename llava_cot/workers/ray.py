"""Workers on many GPUs and machines: Ray actors, each with a model of its own (``pip install "llava-cot[ray]"``)."""

import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_cot.workers.served import Served
from llava_cot.workers.task import ModelSettings, Reply, Task, WorkerDied

try:
    import ray
    from ray.exceptions import RayActorError
except ImportError as error:
    raise ValueError('workers="ray:N" needs Ray: pip install "llava-cot[ray]"') from error

if TYPE_CHECKING:
    from llava_cot.image import ImageLike


class RayWorkers:
    """``count`` actors, each of which answers ``in_flight`` tasks at most at once.

    If the cluster has GPUs each actor has one of its own. A cluster that runs already is found as Ray finds it, by
    ``RAY_ADDRESS``; otherwise one is started on this machine. A task goes to the actor with the fewest. An actor that
    dies is started again, and what it had is reported with ``WorkerDied``.

    Raises:
        ValueError, TypeError: naming the setting that is wrong, from the first actor that could not load its model.
    """

    def __init__(self, settings: ModelSettings, count: int, in_flight: int) -> None:
        self._settings, self._in_flight = settings, in_flight
        self._began = not ray.is_initialized()
        if self._began:
            before = signal.getsignal(signal.SIGTERM)
            ray.init(include_dashboard=False, log_to_driver=False, logging_level="warning")
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, before)  # Ray's own exits with another code than the command's
        self._resources = {"num_gpus": 1} if ray.cluster_resources().get("GPU", 0) else {"num_cpus": 1}
        self._failed: list[tuple[Task, Exception]] = []
        self._actors: list[_Actor] = []
        try:
            self._actors = [_Actor(self._begin()) for _ in range(count)]
            for actor in self._actors:
                _await_ready(actor.handle)
        except BaseException:
            self.close()
            raise

    def has_room(self, alone: bool) -> bool:
        return any(self._fits(actor, alone) for actor in self._actors)

    def start(self, task: Task, alone: bool = False) -> None:
        try:
            sent = replace(task, images=tuple(map(_portable, task.images)))
        except ValueError as error:
            self._failed.append((task, error))
            return
        actor = min((a for a in self._actors if self._fits(a, alone)), key=lambda a: len(a.running))
        actor.running[actor.handle.answer.remote(sent)] = task
        actor.is_taken = alone

    def wait(self) -> Iterator[tuple[Task, Reply | Exception]]:
        failed, self._failed = self._failed, []
        yield from failed
        running = [reference for actor in self._actors for reference in actor.running]
        if not running:
            return
        ready, _ = ray.wait(running, num_returns=1, timeout=0 if failed else None)
        more, _ = ray.wait(running, num_returns=len(running), timeout=0)
        for actor in self._actors:
            for reference in [r for r in actor.running if r in {*ready, *more}]:
                task = actor.running.pop(reference, None)
                if task is None:
                    continue
                try:
                    reply = ray.get(reference)
                except RayActorError as error:
                    lost = [task, *actor.running.values()]
                    actor.running.clear()
                    self._restart(actor)
                    yield from ((each, _died(error)) for each in lost)
                else:
                    yield task, reply
            actor.is_taken = actor.is_taken and bool(actor.running)

    async def answer(self, task: Task) -> Reply | Exception:
        """The reply to one task, for asyncio callers, who do not use ``start`` and ``wait`` beside this."""
        actor = min(self._actors, key=lambda actor: len(actor.running))
        handle, reference = actor.handle, actor.handle.answer.remote(task)
        actor.running[reference] = task
        try:
            return await reference
        except RayActorError as error:
            if actor.handle is handle:  # the first of its tasks to see it
                self._restart(actor)
            return _died(error)
        finally:
            actor.running.pop(reference, None)

    def close(self) -> None:
        for actor in self._actors:
            ray.kill(actor.handle)
        self._actors.clear()
        if self._began:
            ray.shutdown()

    def _fits(self, actor: "_Actor", alone: bool) -> bool:
        return not actor.is_taken and len(actor.running) < (1 if alone else self._in_flight)

    def _begin(self) -> Any:
        """Start an actor. It loads its model in the background."""
        kind = ray.remote(max_concurrency=self._in_flight + 1, max_restarts=0, **self._resources)(Served)
        return kind.remote(self._settings, has_process=True)

    def _restart(self, actor: "_Actor") -> None:
        """Put a new process in the place of one that died. If it can't load its model, the run ends."""
        actor.handle = self._begin()
        _await_ready(actor.handle)


@dataclass
class _Actor:
    handle: Any
    running: dict[Any, Task] = field(default_factory=dict)  # by the reference to the reply
    is_taken: bool = False  # by a task that is to be alone


def _await_ready(handle: Any) -> None:
    if (error := ray.get(handle.ready.remote())) is not None:
        raise error


def _died(error: Exception) -> WorkerDied:
    return WorkerDied(f"the worker died: {error}".splitlines()[0])


def _portable(image: "ImageLike") -> "ImageLike":
    """The bytes of an image that is a file here, since another machine may not have it."""
    if isinstance(image, Path) or (isinstance(image, str) and not image.startswith(("data:", "file:"))):
        try:
            return Path(image).read_bytes()
        except OSError as error:
            raise ValueError(f"image must be a readable image, got {str(image)!r}: {error.strerror}") from None
    return image
