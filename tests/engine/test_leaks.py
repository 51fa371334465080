"""Pages and images are given back in every outcome."""

import random
import signal
import time

import pytest

from llava_cot import STAGES, EngineConfig, SwiresConfig, SwiresGenerator, TokenBeamConfig
from llava_cot.data import shapes
from llava_cot.engine import draw, runner
from llava_cot_kernels import OutOfPages

LIMITS = dict(zip(STAGES, (6, 8, 8, 4)))  # tokens: short searches, to interrupt many
CONFIG = SwiresConfig.published(max_stage_tokens=LIMITS, max_rounds=2)  # which no stage passes: it goes back once
SAMPLE = shapes.sample(802_000)


class Interruption(KeyboardInterrupt):
    pass


@pytest.fixture(scope="session")  # as the fixture that it replaces, which others of that scope build upon
def tiny(tiny):
    """With the canary, which must find nothing in what an interrupted step has left."""
    calibrations = [*tiny.calibrations.values()]
    config = EngineConfig(page_size=4, canary=True)
    return SwiresGenerator(tiny.model, tiny.processor, calibrations=calibrations, engine=config)


def _assert_nothing_held(generator):
    assert generator.engine.pages_in_use == 0
    assert generator.engine.pool.num_sequences == 0
    assert generator.engine.images_in_use == 0


@pytest.mark.parametrize("module, where", [(draw, "sample"), (runner, "copy_pages")], ids=["sample", "copy_pages"])
def test_an_interrupt_at_any_call_of_an_op(tiny, monkeypatch, module, where, is_full):
    original, calls = getattr(module, where), 0

    def counting(*args, **kwargs):
        nonlocal calls
        calls += 1
        return original(*args, **kwargs)

    monkeypatch.setattr(module, where, counting)
    expected = tiny.answer(SAMPLE.image, SAMPLE.question, CONFIG).tokens
    for stop_at in range(1, calls + 1, max(1, calls // (40 if is_full else 15))):
        remaining = stop_at

        def interrupting(*args, **kwargs):
            nonlocal remaining
            remaining -= 1
            if remaining == 0:
                raise Interruption
            return original(*args, **kwargs)

        monkeypatch.setattr(module, where, interrupting)
        with pytest.raises(Interruption):
            tiny.answer(SAMPLE.image, SAMPLE.question, CONFIG)
        _assert_nothing_held(tiny)
    monkeypatch.setattr(module, where, original)
    assert tiny.answer(SAMPLE.image, SAMPLE.question, CONFIG).tokens == expected


@pytest.mark.parametrize("search", [CONFIG, TokenBeamConfig(num_beams=4, max_new_tokens=20)], ids=["swires", "beams"])
def test_a_signal_at_any_time(tiny, search, is_full):
    """Ctrl-C between any two bytecodes, often, at random in the CPU time that the search takes."""
    tiny.answer(SAMPLE.image, SAMPLE.question, search)
    clock, began = random.Random(0), time.process_time()
    tiny.answer(SAMPLE.image, SAMPLE.question, search)
    whole = time.process_time() - began
    interrupted, times = 0, 50 if is_full else 20

    def handler(signum, frame):
        raise Interruption

    previous = signal.signal(signal.SIGPROF, handler)
    try:
        for _ in range(times):
            try:
                try:
                    signal.setitimer(signal.ITIMER_PROF, clock.uniform(0.001, whole))
                    tiny.answer(SAMPLE.image, SAMPLE.question, search)
                finally:
                    signal.setitimer(signal.ITIMER_PROF, 0)
            except Interruption:  # it may come in the ``finally`` too
                interrupted += 1
            tiny.engine.step()  # a second interrupt can't come, so this finishes what an interrupt cut short
            _assert_nothing_held(tiny)
    finally:
        signal.signal(signal.SIGPROF, previous)
    assert interrupted > times // 5


@pytest.mark.parametrize("call", [1, 2, 3, 4])
def test_a_scorer_that_raises(tiny, call):
    calls = 0

    def scorer(spans):
        nonlocal calls
        calls += 1
        if calls >= call:
            raise RuntimeError("no score today")
        return [0.0] * len(spans)

    with pytest.raises(RuntimeError, match="no score today"):
        tiny.answer(
            SAMPLE.image, SAMPLE.question, SwiresConfig.published(max_new_tokens=160, scorer=scorer, cutoff=-1.0)
        )
    _assert_nothing_held(tiny)


def test_too_few_pages(tiny, bare_generator):
    generator = bare_generator(tiny.model, page_size=4, num_pages=12)
    with pytest.raises(OutOfPages, match=r"num_pages=12 of page_size=4.*too small.*raise num_pages"):
        generator.answer(SAMPLE.image, SAMPLE.question, "greedy", max_new_tokens=160)
    _assert_nothing_held(generator)


def test_a_closed_stream(tiny):
    stream = tiny.stream(SAMPLE.image, SAMPLE.question, CONFIG)
    next(stream)
    assert tiny.engine.pages_in_use > 0
    stream.close()
    _assert_nothing_held(tiny)
