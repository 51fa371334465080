"""The methods of ``SwiresGenerator`` for asyncio."""

import asyncio
from collections.abc import AsyncGenerator as AsyncEvents
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

from llava_cot.answer import Answer, Finished
from llava_cot.image import Images
from llava_cot.question import Question
from llava_cot.search import SearchLike
from llava_cot.search.events import Event
from llava_cot.search.stream import EventStream
from llava_cot.stepper import AsyncEngine

if TYPE_CHECKING:
    from llava_cot.searcher import Searcher


class AsyncGenerator:
    """``generator.aio``: each method takes the arguments of the generator's method of the same name.

    All callers, in any event loop, and the generator's own methods share forward passes. Cancelling a task ends its
    search and gives back everything that it holds.
    """

    def __init__(self, generator: "Searcher") -> None:
        self._generator = generator
        self.engine = AsyncEngine(generator.backend)

    async def answer(
        self, image: Images, question: Question, search: SearchLike = "swires", *, seed: int = 0, **settings: Any
    ) -> Answer:
        """See ``SwiresGenerator.answer``."""
        return (await self.answer_batch([image], [question], search, seed=seed, **settings))[0]

    @overload
    async def answer_batch(
        self,
        images: Sequence[Images],
        questions: Sequence[Question],
        search: SearchLike = "swires",
        *,
        seed: int = 0,
        return_exceptions: Literal[False] = False,
        **settings: Any,
    ) -> list[Answer]: ...

    @overload
    async def answer_batch(
        self,
        images: Sequence[Images],
        questions: Sequence[Question],
        search: SearchLike = "swires",
        *,
        seed: int = 0,
        return_exceptions: Literal[True],
        **settings: Any,
    ) -> list[Answer | Exception]: ...

    async def answer_batch(
        self,
        images: Sequence[Images],
        questions: Sequence[Question],
        search: SearchLike = "swires",
        *,
        seed: int = 0,
        return_exceptions: bool = False,
        **settings: Any,
    ) -> list[Answer] | list[Answer | Exception]:
        """See ``SwiresGenerator.answer_batch``."""
        plan = self._generator.plan(search, **settings)
        submit_all = self._generator.submit_all
        runs = submit_all(images, questions, plan, seed=seed, return_exceptions=return_exceptions)
        await asyncio.gather(*map(self.engine.run, runs))
        return self._generator.answers_of(runs) if return_exceptions else [*map(self._generator.answer_of, runs)]

    async def stream(
        self, image: Images, question: Question, search: SearchLike = "swires", *, seed: int = 0, **settings: Any
    ) -> AsyncEvents[Event | Finished, None]:
        """See ``SwiresGenerator.stream``."""
        events: list[Event] = []
        plan = self._generator.plan_of_stream(search, **settings)
        run = self._generator.submit(image, question, plan, seed=seed, on_event=events.append)
        seen, loop = EventStream(run, events, self._generator.detokeniser()), asyncio.get_running_loop()
        queue: asyncio.Queue[Event | None] = asyncio.Queue()

        def pass_on() -> None:
            for event in seen.take():
                loop.call_soon_threadsafe(queue.put_nowait, event)

        task = asyncio.create_task(self.engine.run(run, pass_on))
        task.add_done_callback(lambda _: queue.put_nowait(None))
        try:
            while (event := await queue.get()) is not None:
                yield event
            await task
            yield Finished(self._generator.answer_of(run))
        finally:
            task.cancel()
