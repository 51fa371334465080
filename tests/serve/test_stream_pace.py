"""New text of a stream comes in fewer and larger pieces where many searches run."""

import asyncio
from itertools import count
from types import SimpleNamespace

import pytest
from helpers.serving import world

from llava_cot.search.events import TextDelta
from llava_cot.serve import running
from llava_cot.serve.intake import Work


async def texts_of_all(generator, number):
    """The pieces of text of each of ``number`` streams that run at once."""
    sample, plan = world(3), generator.plan("greedy", max_new_tokens=64)
    work = Work("tiny", plan, sample.question, [sample.image], (0,), "messages")

    async def pieces():
        items = running.follow(generator, work, lambda run: None)
        return [item.text async for _, item, _ in items if isinstance(item, TextDelta)]

    return await asyncio.gather(*(pieces() for _ in range(number)))


@pytest.mark.parametrize("number", [1, 3])
def test_text_that_comes_too_soon_waits_for_more(tiny, monkeypatch, number):
    expected = tiny.answer(world(3).image, world(3).question, "greedy", max_new_tokens=64).text
    # The clock stands still, so that nothing more is due before the end.
    monkeypatch.setattr(running, "time", SimpleNamespace(monotonic=lambda: 0.0))
    for pieces in asyncio.run(texts_of_all(tiny, number)):
        assert len(pieces) == 2
        assert "".join(pieces) == expected


def test_text_that_is_due_comes_with_each_step(tiny, monkeypatch):
    clock = count()
    monkeypatch.setattr(running, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    for pieces in asyncio.run(texts_of_all(tiny, 2)):
        assert len(pieces) > 40
