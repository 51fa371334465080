"""Run the searches of one request, and end them when the client has gone."""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import suppress
from typing import TypeVar

from starlette.requests import Request

from llava_cot.answer import Answer
from llava_cot.generator import SwiresGenerator
from llava_cot.search.events import Event, TextDelta
from llava_cot.search.run import SearchRun
from llava_cot.search.stream import EventStream
from llava_cot.searcher import cancel_all
from llava_cot.serve.errors import as_request_error
from llava_cot.serve.intake import Work

TEXTS = 250  # pieces of new text a second that all streams together send; each keeps the engine's thread waiting
Result = TypeVar("Result")


async def answers(generator: SwiresGenerator, work: Work) -> list[Answer]:
    """Answer all seeds of ``work``. Cancelling this ends its searches."""
    return [generator.answer_of(run) for run in await ended(generator, work)]


async def ended(generator: SwiresGenerator, work: Work) -> list[SearchRun]:
    """Run the searches of all seeds of ``work`` to their ends. Cancelling this ends them.

    Raises:
        RequestError: one of them failed. What is not the request's fault is in the log alone.
    """
    runs = submit_all(generator, work)
    try:
        await asyncio.gather(*map(generator.aio.engine.run, runs))
        for run in runs:
            check(generator, run, work.field)
        return runs
    finally:
        cancel_all(runs)


async def follow(
    generator: SwiresGenerator, work: Work, look: Callable[[SearchRun], str | None]
) -> AsyncGenerator[tuple[int, Event | Answer, str | None], None]:
    """Answer all seeds of ``work``, and yield their events as they happen, and each answer when it is there.

    An item begins with the index of the seed. ``look`` is called in the engine's thread after a step that brought
    events other than new text, and what it returns comes with the last of them. The more searches run, the more new
    text comes at once: one that runs alone yields the text of each step.
    """
    loop, queue = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Event | None, str | None]]()
    logs: list[list[Event]] = [[] for _ in work.seeds]
    runs = submit_all(generator, work, [events.append for events in logs])

    async def watch(index: int, run: SearchRun) -> None:
        seen, due = EventStream(run, logs[index], generator.detokeniser()), 0.0

        def pass_on() -> None:
            nonlocal due
            now = time.monotonic()
            if now < due and not logs[index] and not run.done:
                return
            if events := seen.take():
                due = now + len(generator.engine.schedule.running) / TEXTS
            has_news = any(not isinstance(event, TextDelta) for event in events)  # a trace has no unfinished text
            shown = look(run) if has_news else None
            for event in events:
                part = shown if event is events[-1] else None
                loop.call_soon_threadsafe(queue.put_nowait, (index, event, part))

        try:
            await generator.aio.engine.run(run, pass_on)
        finally:
            queue.put_nowait((index, None, None))

    tasks = [asyncio.create_task(watch(index, run)) for index, run in enumerate(runs)]
    left = len(runs)
    try:
        while left:
            index, event, shown = await queue.get()
            if event is not None:
                yield index, event, shown
                continue
            left -= 1
            await tasks[index]
            check(generator, runs[index], work.field)
            yield index, generator.answer_of(runs[index]), None
    finally:
        for task in tasks:
            task.cancel()
        cancel_all(runs)


def submit_all(
    generator: SwiresGenerator, work: Work, on_event: Sequence[Callable[[Event], None]] | None = None
) -> list[SearchRun]:
    """Start a search for each seed."""
    runs: list[SearchRun] = []
    try:
        for index, seed in enumerate(work.seeds):
            listener = {} if on_event is None else {"on_event": on_event[index]}
            runs.append(generator.submit(list(work.images), work.question, work.plan, seed=seed, **listener))
    except BaseException:
        cancel_all(runs)
        raise
    return runs


def check(generator: SwiresGenerator, run: SearchRun, field: str) -> None:
    """Raise ``RequestError`` if a search that has ended failed. What is not the request's fault is in the log alone."""
    if error := generator.error_of(run):
        raise as_request_error(error, field) from error


async def unless_gone(request: Request, work: Awaitable[Result]) -> Result:
    """Await ``work``, and cancel it as soon as the client has closed the connection.

    Raises:
        ClientGone: the client has.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.create_task(_until_gone(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return await task
    finally:
        gone.cancel()
        task.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await task


class ClientGone(Exception):
    """The client closed the connection before its reply was there."""


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
