"""Random schedules: searches of every kind together, which fork, prune, go back, fail, are cancelled, run out of pages.

After each, every page is free, and a search that finished equals its undisturbed twin: the same search alone in an
engine with pages enough. The canary looks at every page that is read.
"""

import itertools
import random
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest

from llava_cot import (
    STAGES,
    BestOfNConfig,
    GreedyConfig,
    MajorityConfig,
    SampleConfig,
    SentenceBeamConfig,
    StageBeamConfig,
    SwiresConfig,
    TokenBeamConfig,
)
from llava_cot.core import Call
from llava_cot.data import shapes
from llava_cot.scoring import Borda, JudgeScorer, by_stage, confidence, look_ahead, self_consistency, vote
from llava_cot.search import POLICIES
from llava_cot.search.budget import Budget
from llava_cot.search.run import SearchRun
from llava_cot_kernels import OutOfPages

RANKS = Borda({confidence: 1, vote: 1})
SAMPLES = [shapes.sample(seed) for seed in range(806_000, 806_006)]
LIMITS = dict(zip(map(str, STAGES), (14, 14, 14, 6)))  # tokens: some stages close and some do not
PAGE_SIZE = 4  # of the twins' engine
NUM_SEARCHES, NUM_SCHEDULES = 33, 22


@dataclass(frozen=True)
class Asked:
    """A search, all that it depends on."""

    sample: int
    search: Any
    seed: int


def lot(salt, span) -> int:
    """A number in [0, 8) that is the candidate's own: a search that starts again must meet the same luck."""
    return random.Random(f"{salt} {span.tokens}").randrange(8)


def flaky(salt, how):
    """A scorer that fails for some candidates: for all of a call, or for one."""

    def scorer(spans):
        lots = [lot(salt, span) for span in spans]
        if how == "raise" and min(lots) < 4:
            raise RuntimeError(f"no score for lot {salt}")
        if how == "number" and lots[0] < 4:
            return [0.0] * (len(spans) + 1)
        return [float("nan") if how == "nan" and own < 2 else score for own, score in zip(lots, confidence(spans))]

    return scorer


def measured(spans):
    """As a reward model would: host work that is merged with that of other searches, and fails for some items."""
    if any(lot("measured", span) == 0 for span in spans):
        raise OverflowError("too much")
    return [lot("measured", span) - span.logprobs[-1] for span in spans]


def by_call(spans):
    return (yield [Call(measured, spans)])[0]


def _search(rng: random.Random, judge: JudgeScorer, kind: int) -> Any:
    """The policies in turn, with any scorer and often with a budget."""
    scorer = rng.choice(
        [confidence, confidence, look_ahead, vote, judge, by_call, self_consistency, by_stage, RANKS]
        + [flaky(rng.randrange(99), how) for how in ("raise", "nan", "raise", "nan", "number")]
    )
    limits = [
        dict(generated_tokens=rng.randrange(20, 200)),
        dict(generations=rng.randrange(2, 9)),
        dict(scorer_calls=rng.randrange(1, 9)),
        dict(prompt_tokens=rng.randrange(10, 200)),
    ]
    budget = rng.choice([None, None, None, *(Budget(**limit) for limit in limits)])
    drawn = dict(temperature=rng.choice([0.6, 1.0]), max_new_tokens=rng.choice([25, 45]), budget=budget)
    swires = dict(cutoff=rng.choice([-1.0, -0.05, 0.0, 0.4]), max_stage_tokens=LIMITS, scorer=scorer, **drawn)
    kinds = [
        lambda: GreedyConfig(max_new_tokens=40, budget=budget),
        lambda: SampleConfig(num_return_sequences=3, **drawn),
        lambda: BestOfNConfig(n=3, scorer=scorer, **drawn),
        lambda: MajorityConfig(n=4, scorer=scorer, **drawn),
        lambda: TokenBeamConfig(num_beams=rng.randrange(1, 5), max_new_tokens=20, budget=budget),
        lambda: SentenceBeamConfig(candidates=4, keep=2, scorer=scorer, **drawn),
        lambda: StageBeamConfig(max_stage_tokens=LIMITS, scorer=scorer, **drawn),
        lambda: SwiresConfig.published(**swires),
        lambda: SwiresConfig.released(**{**swires, "max_rounds": 3}),
        lambda: SwiresConfig.prose(**swires),
        lambda: SwiresConfig(accept_after=2, num_return_sequences=2, **swires),
    ]
    return kinds[kind % len(kinds)]()


def run_of(generator, asked: Asked) -> SearchRun:
    sample = SAMPLES[asked.sample]
    return generator.submit(sample.image, sample.question, generator.plan(asked.search), seed=asked.seed)


def outcome(job: SearchRun) -> Any:
    """What two equal searches have in common: all but the time they took."""
    if job.error:
        return type(job.error), str(job.error)
    search, best = job.search, job.result
    nodes = [
        (
            (node.parent.id, node.stage, node.round, node.index, node.continuation.seed, node.tokens),
            (node.finish, node.closed, node.kept, node.violation, node.error),
            node.score if node.score is None else pytest.approx(node.score, abs=1e-4),
        )
        for node in search.nodes[1:]
    ]
    events = [(e["event"], e.get("stage"), e.get("round"), e.get("kept"), e.get("what")) for e in search.log]
    return [node.id for node in best], nodes, events


@pytest.fixture(scope="module")
def searches(tiny, bare_generator):
    """Each with the outcome of its undisturbed twin, for which nothing is drafted, and the most pages that one held."""
    tiny = bare_generator(tiny.model, draft_tokens=0)
    rng, found, judge = random.Random(6), [], JudgeScorer(tiny.processor)
    for kind in range(NUM_SEARCHES):
        asked = Asked(rng.randrange(len(SAMPLES)), _search(rng, judge, kind), rng.randrange(2**62))
        tiny.engine.runner.peak_pages, job = 0, run_of(tiny, asked)
        tiny.wait([job])
        found.append((asked, outcome(job), tiny.engine.runner.peak_pages))
    assert {type(asked.search) for asked, *_ in found} == {config for config, _ in POLICIES.values()}
    return found


def run(engine, jobs: list[SearchRun], rng: random.Random, tally: Counter) -> bool:
    """Run ``jobs``, cancelling some of them; False if it was given up on the way."""
    cancel_at = {rng.randrange(1, 50): job for job in rng.sample(jobs, min(len(jobs), rng.randrange(3)))}
    close_at = rng.randrange(1, 70) if rng.random() < 0.25 else None
    for step in itertools.count():
        if all(job.done for job in jobs):
            return True
        engine.step()
        owned = sum(branch.seq >= 0 for job in jobs for branch in job.session._job.branches)
        assert engine.pool.num_sequences == owned and (engine.pages_in_use > 0) == (owned > 0)
        if step in cancel_at and not cancel_at[step].done:
            cancel_at[step].cancel()
            tally["cancelled"] += 1
        if step == close_at:
            tally["closed"] += 1
            for job in jobs:
                job.cancel()
            return False


def check(generator, job: SearchRun, twin: Any, asked: Asked, is_whole: bool, tally: Counter) -> None:
    """A search that ran out of pages is run again, to see that it does not fit into this engine alone."""
    if isinstance(job.error, OutOfPages):
        tally["out of pages"] += 1
        spare = run_of(generator, asked)
        generator.wait([spare])
        assert str(spare.error) == str(job.error)
    elif job.error or job.result:
        tally["failed" if job.error else "finished"] += 1
        usage = job.search.usage
        tally["computed again"] += usage.recomputed_tokens > 0
        tally["drafts rejected"] += usage.drafted_tokens > usage.accepted_tokens
        tally["drafts accepted"] += usage.accepted_tokens > 0
        tally["computed for several"] += usage.shared_tokens > 0
        assert outcome(job) == twin
    else:
        assert job._is_cancelled or not is_whole


def count_twins(searches, tally: Counter) -> None:
    for _, twin, _ in searches:
        if isinstance(twin, list | tuple) and len(twin) == 3:
            _, nodes, events = twin
            tally["retraced"] += sum(event[0] == "retraced" for event in events)
            tally["budget spent"] += sum(event[0] == "budget_spent" for event in events)
            tally["candidates without score"] += sum(fate[-1] is not None for _, fate, _ in nodes)


def schedule(make_generator, searches, rng: random.Random, tally: Counter) -> None:
    """A few of ``searches`` at once in a cache that is often too small for all of them, and sometimes for one."""
    chosen = rng.choices(searches, k=rng.randrange(1, 8))  # the same search twice, too
    page_size = rng.choice([1, 2, 4, 16])
    tokens = PAGE_SIZE * max(peak for *_, peak in chosen) * rng.choice([0.3, 0.7, 1.0, 1.3, 2.0, 8.0])
    num_pages, steps_per_look = max(1, int(tokens / page_size)), rng.choice([1, 1, 2, 3, 8])
    generator = make_generator(
        page_size=page_size,
        num_pages=num_pages,
        steps_per_look=steps_per_look,
        canary=True,
        draft_tokens=rng.choice([0, 2, 8]),
    )
    engine = generator.engine
    engine.runner.replays = rng.random() < 0.3  # as on CUDA
    jobs = [run_of(generator, asked) for asked, *_ in chosen]
    is_whole = run(engine, jobs, rng, tally)
    assert engine.pool.num_free == engine.pool.num_pages
    assert (engine.pool.num_sequences, engine.images_in_use) == (0, 0)
    for job, (asked, twin, _) in zip(jobs, chosen):
        check(generator, job, twin, asked, is_whole, tally)
    assert engine.pool.num_free == engine.pool.num_pages


def test_random_schedules(tiny, bare_generator, searches):
    tally: Counter = Counter()
    count_twins(searches, tally)
    for seed in range(NUM_SCHEDULES):
        try:
            schedule(partial(bare_generator, tiny.model), searches, random.Random(seed), tally)
        except Exception as error:
            error.add_note(f"in schedule {seed}")
            raise
    # A schedule in which nothing happens shows nothing.
    for kind in (
        *("finished", "failed", "computed again", "out of pages", "cancelled", "closed"),
        *("drafts rejected", "drafts accepted", "computed for several"),
        *("retraced", "budget spent", "candidates without score"),
    ):
        assert tally[kind] >= 3, f"{kind}: {tally}"
