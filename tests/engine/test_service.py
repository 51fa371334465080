"""The engine as a service: searches that come and go at any time, from any thread, share forward passes."""

import asyncio
import concurrent.futures
import random
import sys
import threading
import time

import pytest
import torch

from llava_cot import Finished, SwiresConfig
from llava_cot.core import Call, Expand, Extend, Release, SamplingParams
from llava_cot.data import shapes
from llava_cot.engine.engine import Engine
from llava_cot.search.drive import Drive
from llava_cot.search.events import TextDelta
from llava_cot.stepper import AsyncEngine
from llava_cot_kernels import OutOfPages

SAMPLES = [shapes.sample(seed) for seed in range(807_000, 807_010)]
CONFIG = SwiresConfig.published(max_new_tokens=100)
SEARCHES = ["greedy", "sample", CONFIG, "token_beam", "best_of_n"]


def assert_nothing_held(engine: Engine) -> None:
    assert (engine.pages_in_use, engine.pool.num_sequences, engine.images_in_use) == (0, 0, 0)
    assert not engine.schedule.jobs and not engine.has_work


def passes_of(monkeypatch, engine: Engine) -> list[int]:
    """Gets an entry for every forward pass over tokens that grow, with their number."""
    found, decode = [], engine.runner.decode

    def counting(tokens, **settings):
        found.append(len(tokens))
        return decode(tokens, **settings)

    monkeypatch.setattr(engine.runner, "decode", counting)
    return found


def test_two_streams_and_a_batch_share_forward_passes(tiny, monkeypatch):
    settings = dict(max_new_tokens=80)
    alone = [tiny.answer(s.image, s.question, "greedy", **settings) for s in SAMPLES[:4]]
    longest = max(answer.usage.steps for answer in alone)
    passes = passes_of(monkeypatch, tiny.engine)
    streams = [tiny.stream(s.image, s.question, "greedy", **settings) for s in SAMPLES[:2]]
    first = [next(stream) for stream in streams]
    batch = tiny.answer_batch([s.image for s in SAMPLES[2:4]], [s.question for s in SAMPLES[2:4]], "greedy", **settings)
    assert len(passes) <= longest + 3 and max(passes) == 4
    for stream, event, answer in zip(streams, first, alone):
        *events, last = stream
        assert isinstance(last, Finished) and last.answer.tokens == answer.tokens
        text = "".join(e.text for e in [event, *events] if isinstance(e, TextDelta))
        assert text == answer.text
    assert len(passes) <= longest + 3, "the streams went on in the passes of the batch"
    assert [answer.tokens for answer in batch] == [answer.tokens for answer in alone[2:]]
    assert_nothing_held(tiny.engine)


@pytest.fixture(scope="module")
def fifty(tiny):
    """Fifty searches and their undisturbed twins. Fifteen differ, three of each kind; the others are asked again."""
    rng = random.Random(5)
    distinct = [(rng.choice(SAMPLES), search, rng.randrange(2**60)) for search in SEARCHES for _ in range(3)]
    settings = dict(max_new_tokens=40)
    pairs = [(one, tiny.answer(one[0].image, one[0].question, one[1], seed=one[2], **settings)) for one in distinct]
    fifty = pairs + rng.choices(pairs, k=50 - len(pairs))
    rng.shuffle(fifty)
    return fifty


@pytest.mark.parametrize("num_pages", [None, 400], ids=["roomy", "crowded"])
def test_fifty_streams_from_fifty_threads(tiny, bare_generator, monkeypatch, fifty, num_pages):
    """A third is closed half-way; the others equal undisturbed runs."""
    rng = random.Random(7)
    delays, victims = [rng.random() * 0.5 for _ in fifty], set(rng.sample(range(50), 17))
    generator = bare_generator(tiny.model, page_size=4, num_pages=num_pages)
    generator.calibrations = tiny.calibrations
    passes = passes_of(monkeypatch, generator.engine)
    begun, results, errors = threading.Barrier(50), {}, []

    def run(index: int) -> None:
        torch.set_num_threads(1)
        (sample, search, seed), _ = fifty[index]
        try:
            begun.wait()
            time.sleep(delays[index])
            events = generator.stream(sample.image, sample.question, search, seed=seed, max_new_tokens=40)
            for count, event in enumerate(events):
                if index in victims and count == 1:
                    events.close()
                elif isinstance(event, Finished):
                    results[index] = event.answer
        except BaseException as error:
            errors.append((index, error))

    threads = [threading.Thread(target=run, args=(index,)) for index in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    for index, ((_, search, _), twin) in enumerate(fifty):
        if index not in victims:
            assert results[index].tokens == twin.tokens, search
    assert_nothing_held(generator.engine)
    if num_pages is None:  # work that overlaps runs in the same passes
        assert len(passes) < 0.5 * sum(twin.usage.steps for _, twin in fifty)


def test_streams_that_overlap_take_the_passes_of_the_longest(tiny, monkeypatch, fifty):
    """Fifty searches opened at random steps, a third closed half-way: at most 1.3 times the longest chain of work."""
    rng = random.Random(6)
    opens_at, victims = [rng.randrange(40) for _ in fifty], set(rng.sample(range(50), 17))
    passes, steps, running, done = passes_of(monkeypatch, tiny.engine), 0, {}, {}
    while len(done) < len(fifty):
        for index, ((sample, search, seed), _) in enumerate(fifty):
            if opens_at[index] == steps:
                plan = tiny.plan(search, max_new_tokens=40)
                running[index] = tiny.submit(sample.image, sample.question, plan, seed=seed)
        tiny.engine.step()
        steps += 1
        for index, run in [*running.items()]:
            if index in victims and steps - opens_at[index] >= fifty[index][1].usage.steps // 2:
                run.cancel()
            if run.done:
                done[index] = running.pop(index)
    for index, (_, twin) in enumerate(fifty):
        if index not in victims:
            assert tiny.answer_of(done[index]).tokens == twin.tokens
    longest = max(at + twin.usage.steps for at, (_, twin) in zip(opens_at, fifty))
    assert len(passes) <= 1.3 * longest
    assert_nothing_held(tiny.engine)


def test_a_search_that_others_starve_waits(tiny, bare_generator):
    """It never hears that the cache is too small, which it is not for it alone; one that needs too much does."""
    sample = SAMPLES[0]
    tiny.engine.runner.peak_pages = 0
    expected = tiny.answer(sample.image, sample.question, "best_of_n", max_new_tokens=100)
    peak = tiny.engine.runner.peak_pages
    generator = bare_generator(tiny.model, page_size=4, num_pages=peak + 2)
    streams = [generator.stream(sample.image, sample.question, "best_of_n", max_new_tokens=100) for _ in range(4)]
    for stream in streams:
        *_, last = stream  # one after the other, while the others are open
        assert last.answer.tokens == expected.tokens
    small = bare_generator(tiny.model, page_size=4, num_pages=peak // 2)
    with pytest.raises(OutOfPages, match="too small for this search alone"):
        small.answer(sample.image, sample.question, "best_of_n", max_new_tokens=100)
    assert_nothing_held(generator.engine)
    assert_nothing_held(small.engine)


def test_a_program_may_run_another_search(tiny):
    """A scorer that asks the generator itself: a step inside a step."""
    sample = SAMPLES[1]

    def scorer(spans):
        answers = [tiny.answer(sample.image, sample.question, "greedy", max_new_tokens=20) for _ in spans]
        return [float(len(answer.tokens) - index) for index, answer in enumerate(answers)]

    both = [SAMPLES[1], SAMPLES[2]]
    search = dict(search="best_of_n", scorer=scorer, max_new_tokens=40)
    found = tiny.answer_batch([s.image for s in both], [s.question for s in both], **search)
    for answer, s in zip(found, both):
        assert answer.tokens == tiny.answer(s.image, s.question, **search).tokens
    assert_nothing_held(tiny.engine)


@pytest.mark.parametrize("num_pages", [None, 20], ids=["roomy", "crowded"])
def test_a_call_may_run_another_search(tiny, bare_generator, num_pages):
    """Its own search waits, and may even be evicted for the other; the rest of the step goes on after it."""
    generator = bare_generator(tiny.model, page_size=4, num_pages=num_pages)
    inner, outer = SAMPLES[1], SAMPLES[2]
    calls = 0

    def judge(items):
        nonlocal calls
        calls += 1
        return [len(generator.answer(inner.image, inner.question, "greedy", max_new_tokens=20).tokens) for _ in items]

    def policy(search):
        nodes = yield from search.expand([search.root], 2, None, params=SamplingParams())
        ((a, b), more) = yield [
            Call(judge, nodes),
            Expand(nodes[0].continuation.id, (5,), SamplingParams(), 3, frozenset()),
        ]
        assert a == b == 20 and len(more[0].tokens) == 3
        return nodes

    found = generator.answer(outer.image, outer.question, policy, max_new_tokens=24)
    assert calls == 1 and (found.usage.recomputed_tokens > 0) == (num_pages is not None)
    assert found.tokens == tiny.answer(outer.image, outer.question, policy, max_new_tokens=24).tokens
    assert_nothing_held(generator.engine)


@pytest.mark.parametrize("where", ["policy", "call"])
def test_a_nested_search_that_fails_does_not_end_the_outer(tiny, monkeypatch, where):
    failed, decode = [], tiny.engine.runner.decode

    def inner(items=()):
        monkeypatch.setattr(tiny.engine.runner, "decode", out_of_memory)
        try:
            tiny.answer(SAMPLES[0].image, SAMPLES[0].question, "greedy", max_new_tokens=5)
        except torch.OutOfMemoryError as error:
            failed.append(error)
        monkeypatch.setattr(tiny.engine.runner, "decode", decode)
        return [0 for _ in items]

    def out_of_memory(tokens, **settings):
        raise torch.OutOfMemoryError("no room today")

    def policy(search):
        greedy = SamplingParams(temperature=0.0)
        nodes = yield from search.expand([search.root], 2, None, params=greedy, max_stage_tokens=8)
        if where == "call":
            yield [Call(inner, nodes)]
        else:
            inner()
        more = yield from search.expand(nodes[:1], 1, None, params=greedy)
        return more

    tiny.answer(SAMPLES[1].image, SAMPLES[1].question, policy, max_new_tokens=24)
    assert len(failed) == 1
    assert_nothing_held(tiny.engine)


def test_a_session_that_nobody_holds_ends(tiny):
    inputs = _inputs(tiny)
    drive = Drive(session := tiny.engine.open(inputs), _growing(session.root, 50))
    tiny.engine.step()
    assert tiny.engine.pages_in_use > 0
    del drive, session
    tiny.engine.step()
    assert_nothing_held(tiny.engine)


def test_a_session_that_asks_for_nothing_starves_nobody(tiny, bare_generator):
    """It keeps its place only while nobody needs it, and goes on where it was when it asks again."""
    generator = bare_generator(tiny.model, page_size=4, num_pages=40)
    engine, greedy = generator.engine, SamplingParams(temperature=0.0)
    parked, replies = engine.open(_inputs(tiny)), []
    parked.ask([Expand(0, (0,), greedy, 8, frozenset())], replies.append)
    engine.run_until(lambda: bool(replies))
    ((first,),) = replies.pop()
    assert engine.pages_in_use > 0
    answer = generator.answer(SAMPLES[1].image, SAMPLES[1].question, "best_of_n", n=3, max_new_tokens=40)
    assert len(answer.trace.nodes) == 3
    parked.ask([Expand(first.id, (0,), greedy, 8, frozenset())], replies.append)
    engine.run_until(lambda: bool(replies))
    ((second,),) = replies.pop()
    whole = tiny.answer(SAMPLES[0].image, SAMPLES[0].question, "greedy", max_new_tokens=16)
    assert [*first.tokens, *second.tokens] == whole.tokens
    parked.close()
    assert_nothing_held(engine)


def test_a_search_that_is_cancelled_by_its_own_scorer(tiny):
    """The program runs when it is cancelled, and ends when it yields. What it raises while it ends is no hang."""
    runs = []

    def policy(search):
        try:
            yield from search.expand([search.root], 2, None, params=SamplingParams())
            runs[0].cancel()
            yield from search.expand([search.root], 2, None, params=SamplingParams())
        finally:
            raise ValueError("while cleaning up")

    runs.append(tiny.submit(SAMPLES[0].image, SAMPLES[0].question, tiny.plan(policy, max_new_tokens=5)))
    tiny.wait(runs)
    assert runs[0].done and runs[0].result is None and "while cleaning up" in str(runs[0].error)
    assert_nothing_held(tiny.engine)


def test_what_a_session_refuses(tiny):
    session = tiny.engine.open(_inputs(tiny))
    replies: list = []
    session.ask([Expand(0, (1,), SamplingParams(), 3)], replies.append)
    with pytest.raises(ValueError, match="the session must have answered before it is asked again"):
        session.ask([Extend(0, top=1)], replies.append)
    tiny.engine.run_until(lambda: bool(replies))
    ((drawn,),) = replies.pop()
    session.ask([Release((drawn.id,)), Release((drawn.id,))], replies.append)  # once is enough, twice no harm
    tiny.engine.run_until(lambda: bool(replies))
    with pytest.raises(ValueError, match="must name a continuation of this session that has not been released, got 1"):
        session.ask([Expand(drawn.id, (1,), SamplingParams(), 3)], replies.append)
    session.close()
    session.close()
    with pytest.raises(ValueError, match="the session must be open to be asked, but it has been closed"):
        session.ask([Extend(0, top=1)], replies.append)
    assert_nothing_held(tiny.engine)


def test_a_released_parent_and_what_was_grown_from_it(tiny):
    """What is in the same list of requests still grows from it, and the prompt's log-probs are the model's."""
    greedy = SamplingParams(temperature=0.0)

    def program(root):
        ((first,),) = yield [Expand(root, (0,), greedy, 6, frozenset())]
        (kids, (given,), _) = yield [
            Expand(first.id, (0, 0), greedy, 4, frozenset()),
            Extend(first.id, first.tokens[:2], top=3, want=(7, 5)),
            Release((first.id,)),
        ]
        ((again,), _) = yield [Extend(given.id, top=3, want=(7, 5)), Call(len_of, [1])]
        return first, kids, given, again

    def len_of(items):
        return items

    drive = Drive(session := tiny.engine.open(_inputs(tiny)), program(session.root))
    tiny.engine.run_until(lambda: drive.done)
    assert drive.error is None
    first, kids, given, again = drive.result
    whole = tiny.answer(SAMPLES[0].image, SAMPLES[0].question, "greedy", max_new_tokens=10)
    assert (*first.tokens, *kids[0].tokens) == tuple(whole.tokens) and kids[0].tokens == kids[1].tokens
    assert given.top == again.top and given.wanted == again.wanted and again.tokens == ()
    assert len(given.logprobs) == 2 and [p for _, p in given.top] == sorted((p for _, p in given.top), reverse=True)
    assert given.parent == first.id and given.finish is None
    assert_nothing_held(tiny.engine)


def test_logits_that_are_no_numbers_fail_their_own_session(tiny, monkeypatch):
    """One search of a batch meets NaN; the others do not notice."""
    samples = SAMPLES[:3]
    images, questions = [s.image for s in samples], [s.question for s in samples]
    expected = tiny.answer_batch(images, questions, "greedy", max_new_tokens=20)
    decode, count = tiny.engine.runner.decode, 0

    def spoiling(tokens, **settings):
        nonlocal count
        count += 1
        logits = decode(tokens, **settings).clone()
        if count == 5:
            logits[1] = torch.nan
        return logits

    monkeypatch.setattr(tiny.engine.runner, "decode", spoiling)
    found = tiny.answer_batch(images, questions, "greedy", max_new_tokens=20, return_exceptions=True)
    assert isinstance(found[1], ValueError) and "logits must have a finite largest value" in str(found[1])
    assert found[1].trace.data["answer"] is None and found[1].trace.data["usage"]["generated_tokens"] > 0
    assert [found[i].tokens for i in (0, 2)] == [expected[i].tokens for i in (0, 2)]
    assert_nothing_held(tiny.engine)


def test_a_prompt_that_cannot_be_prefilled_fails_alone(tiny, monkeypatch):
    samples = SAMPLES[:3]
    images, questions = [s.image for s in samples], [s.question for s in samples]
    expected = tiny.answer_batch(images, questions, "greedy", max_new_tokens=20)
    prefill = tiny.engine.view.prefill

    def spoiling(prompts, *rest):
        if any(prompt["input_ids"].shape[1] == longest for prompt in prompts):
            raise RuntimeError("a prompt that the model does not take")
        return prefill(prompts, *rest)

    lengths = [answer.trace.data["prompt_tokens"] for answer in expected]
    longest = max(lengths)
    assert lengths.count(longest) == 1
    monkeypatch.setattr(tiny.engine.view, "prefill", spoiling)
    found = tiny.answer_batch(images, questions, "greedy", max_new_tokens=20, return_exceptions=True)
    for answer, length, twin in zip(found, lengths, expected):
        if length == longest:
            assert isinstance(answer, RuntimeError) and "does not take" in str(answer)
        else:
            assert answer.tokens == twin.tokens
    assert_nothing_held(tiny.engine)


def test_a_failed_pass_fails_who_took_part(tiny, monkeypatch):
    def failing(tokens, **settings):
        raise torch.OutOfMemoryError("no room")

    stream = tiny.stream(SAMPLES[0].image, SAMPLES[0].question, "greedy", max_new_tokens=20)
    next(stream)
    with monkeypatch.context() as patch:
        patch.setattr(tiny.engine.runner, "decode", failing)
        with pytest.raises(torch.OutOfMemoryError, match="no room"):
            tiny.answer(SAMPLES[1].image, SAMPLES[1].question, "greedy", max_new_tokens=20)
    with pytest.raises(torch.OutOfMemoryError, match="no room") as of_stream:
        list(stream)
    assert of_stream.value.trace.data["question"] == SAMPLES[0].question, "each has its own"
    assert_nothing_held(tiny.engine)
    assert tiny.answer(SAMPLES[1].image, SAMPLES[1].question, "greedy", max_new_tokens=20).tokens


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: Expand(0, (-1,), SamplingParams(), 3), ValueError, r"seeds must be in \[0, 2\*\*63\), got -1"),
        (lambda: Expand(0, (2**64,), SamplingParams(), 3), ValueError, r"seeds must be in \[0, 2\*\*63\)"),
        (lambda: Expand(0, (1,), SamplingParams(), 2.5), TypeError, "max_new_tokens must be integers, got 2.5"),
        (lambda: Expand(0, (1,), SamplingParams(), 3, trims=None), TypeError, "trims must be a frozenset"),
        (lambda: Extend(0, (5.0,)), TypeError, "tokens must be integers, got 5.0"),
        (lambda: Extend(0, top=1.5), TypeError, "top must be integers, got 1.5"),
        (lambda: SamplingParams(temperature=float("inf")), ValueError, "temperature must be finite, got inf"),
        (lambda: SamplingParams(temperature=1e39), ValueError, "temperature must be finite in float32, got 1e\\+39"),
        (lambda: SamplingParams(top_p=1e-39), ValueError, "top_p must be at least .*, the least normal float32, got"),
        (lambda: SamplingParams(top_k=2**70), ValueError, r"top_k must be < 2\*\*63, got"),
    ],
)
def test_what_would_fail_a_whole_step_is_refused_when_it_is_made(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_session_that_is_closed_before_its_first_step_leaves_nothing(tiny):
    session = tiny.engine.open(_inputs(tiny))
    session.ask([Expand(0, (1,), SamplingParams(), 3, frozenset())], lambda replies: None)
    assert tiny.engine.has_work
    session.close()
    assert not tiny.engine.has_work


def test_an_owner_that_raises_ends_its_own_session(tiny, caplog):
    def done(replies):
        raise ValueError("in done")

    session = tiny.engine.open(_inputs(tiny))
    session.ask([Expand(0, (1,), SamplingParams(), 3, frozenset())], done)
    answer = tiny.answer(SAMPLES[1].image, SAMPLES[1].question, "greedy", max_new_tokens=10)
    assert len(answer.tokens) == 10 and "in done" in caplog.text
    assert_nothing_held(tiny.engine)


def test_an_interrupt_in_a_program_is_told_to_its_owner(tiny):
    def policy(search):
        yield from search.expand([search.root], 1, None, params=SamplingParams())
        raise KeyboardInterrupt

    run = tiny.submit(SAMPLES[0].image, SAMPLES[0].question, tiny.plan(policy, max_new_tokens=5))
    with pytest.raises(KeyboardInterrupt):
        tiny.answer(SAMPLES[1].image, SAMPLES[1].question, "greedy", max_new_tokens=40)
    assert run.done and "the search was interrupted: KeyboardInterrupt" in str(run.error)
    tiny.engine.step()
    assert_nothing_held(tiny.engine)


def test_an_interrupt_ends_the_streams_that_shared_the_pass(tiny, monkeypatch):
    stream = tiny.stream(SAMPLES[0].image, SAMPLES[0].question, "greedy", max_new_tokens=20)
    next(stream)

    def interrupted(tokens, **settings):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tiny.engine.runner, "decode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tiny.answer(SAMPLES[1].image, SAMPLES[1].question, "greedy", max_new_tokens=20)
    with pytest.raises(RuntimeError, match="shared with others was interrupted"):
        list(stream)
    assert_nothing_held(tiny.engine)


def test_an_interrupt_after_any_call_of_the_lead(tiny):
    """Python looks for signals after calls. Whichever is hit, other threads go on and nothing is held."""
    sample, lead = SAMPLES[0], Engine._lead.__code__
    expected = tiny.answer(sample.image, sample.question, "greedy", max_new_tokens=5).tokens
    threads, hits = torch.get_num_threads(), 0
    for stop_at in range(1, 1000):
        remaining = stop_at

        def interrupting(frame, event, arg):
            nonlocal remaining
            if (event == "c_return" and frame.f_code is lead) or (event == "return" and frame.f_back.f_code is lead):
                remaining -= 1
                if remaining == 0:
                    raise KeyboardInterrupt

        sys.setprofile(interrupting)
        try:
            tiny.answer(sample.image, sample.question, "greedy", max_new_tokens=5)
        except KeyboardInterrupt:
            hits += 1
        finally:
            sys.setprofile(None)
        if remaining > 0:
            break
        with concurrent.futures.ThreadPoolExecutor() as other:
            answer = other.submit(tiny.answer, sample.image, sample.question, "greedy", max_new_tokens=5).result()
        assert answer.tokens == expected and torch.get_num_threads() == threads
        assert_nothing_held(tiny.engine)
    assert hits > 40


# --- asyncio ---


def test_asyncio_callers(tiny):
    """Answers, a batch and a stream at once; a task that is cancelled gives everything back."""
    asked = [(SAMPLES[i], search, i) for i, search in enumerate(SEARCHES)]
    twins = [tiny.answer(s.image, s.question, search, seed=seed, max_new_tokens=60) for s, search, seed in asked]

    async def streamed():
        return [
            event async for event in tiny.aio.stream(SAMPLES[0].image, SAMPLES[0].question, "greedy", max_new_tokens=60)
        ]

    async def main():
        tasks = [
            asyncio.create_task(tiny.aio.answer(s.image, s.question, search, seed=seed, max_new_tokens=60))
            for s, search, seed in asked
        ]
        victim = asyncio.create_task(tiny.aio.answer(SAMPLES[5].image, SAMPLES[5].question, CONFIG))
        stream = asyncio.create_task(streamed())
        await asyncio.sleep(0.05)
        victim.cancel()
        batch = await tiny.aio.answer_batch(
            [s.image for s in SAMPLES[:2]], [s.question for s in SAMPLES[:2]], "greedy", max_new_tokens=60
        )
        with pytest.raises(asyncio.CancelledError):
            await victim
        with pytest.raises(ValueError, match="question must be a non-empty string"):
            await tiny.aio.answer(SAMPLES[0].image, " ")
        return await asyncio.gather(*tasks), batch, await stream

    answers, batch, events = asyncio.run(main())
    assert [answer.tokens for answer in answers] == [twin.tokens for twin in twins]
    assert batch[0].tokens == twins[0].tokens
    *deltas, last = events
    assert last.answer.tokens == twins[0].tokens
    assert "".join(e.text for e in deltas if isinstance(e, TextDelta)) == last.answer.text
    assert_nothing_held(tiny.engine)
    tiny.aio.engine.close()
    tiny.__dict__.pop("aio")  # the next test gets a fresh one


def test_an_async_batch_with_a_failed_search(tiny):
    def scorer(spans):
        if spans[0].question == SAMPLES[1].question:
            raise RuntimeError("no score today")
        return [0.0 for _ in spans]

    images, questions = zip(*((s.image, s.question) for s in SAMPLES[:3]))
    settings = dict(search="best_of_n", scorer=scorer, max_new_tokens=20)
    first, failed, last = asyncio.run(tiny.aio.answer_batch(images, questions, return_exceptions=True, **settings))
    assert first.tokens and last.tokens and str(failed) == "no score today" and failed.trace.data["error"]
    with pytest.raises(RuntimeError, match="no score today"):
        asyncio.run(tiny.aio.answer_batch(images, questions, **settings))
    tiny.aio.engine.close()
    tiny.__dict__.pop("aio")
    assert_nothing_held(tiny.engine)


def test_a_closed_async_engine(tiny):
    engine = AsyncEngine(tiny.engine)

    async def main():
        drive = Drive(session := tiny.engine.open(_inputs(tiny)), _growing(session.root, 2000))
        task = asyncio.create_task(engine.run(drive))
        await asyncio.sleep(0.05)
        await asyncio.to_thread(engine.close)
        with pytest.raises(RuntimeError, match="the engine must be open, but it has been closed"):
            await task
        with pytest.raises(RuntimeError, match="the engine must be open, but it has been closed"):
            await engine.run(drive)

    asyncio.run(main())
    tiny.engine.step()
    assert_nothing_held(tiny.engine)


def _inputs(tiny):
    from llava_cot.prompt import build_inputs

    return build_inputs(tiny.processor, SAMPLES[0].image, SAMPLES[0].question, "one")


def _growing(root, tokens):
    yield [Expand(root, (1,), SamplingParams(), tokens, frozenset())]
