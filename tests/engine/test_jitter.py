"""The log-probs of fixed contexts, whatever else the engine does meanwhile.

The same tokens are read in other batches, cuts, windows and pages, beside drafts, with stalls, and through evictions
and preemptions. Where every pass has the same shape, the log-probs are the same bit for bit. Elsewhere their error
against float64 is at most twice the error of transformers' own forward pass with SDPA.
"""

import copy
import random
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from helpers.random_llava import FAMILIES
from helpers.random_mllama import TINY_SHAPE, build_random_mllama, random_inputs

from llava_cot.core import Expand, Extend, SamplingParams
from llava_cot.engine.config import EngineConfig
from llava_cot.engine.engine import Engine
from llava_cot.prompt import split_rows
from llava_cot_kernels.stage_tags import StageTags

TAGS = StageTags([b"a", b"</x>"], ["</x>"])
MILD = SamplingParams(temperature=0.5)  # candidates share their first tokens, and part then
NO_TAG: frozenset[int] = frozenset()
PROMPTS, PATHS, PATH = 4, 3, 26  # prompts, paths of each, and tokens of a path
SHARED = 7  # tokens that the paths of a prompt have in common
FLOOR = 1e-6  # nats, about an ulp of the lowest log-probs: for where SDPA happens to be more exact than that
SCHEDULES = 12

Found = list[tuple[tuple[int, ...], tuple[float, ...]]]  # paths, and the log-probs of the last tokens of each
# A stall in steps, and then a list of requests
Program = Generator[tuple[int, list[Any]], list[list[Any]], Found]


@dataclass(repr=False)
class World:
    """A random model with prompts and fixed paths behind them, and what their log-probs are."""

    model: Any
    inputs: list[dict[str, torch.Tensor]]  # as transformers takes them
    paths: list[list[tuple[int, ...]]]
    known: dict[Any, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert self.model.config._attn_implementation == "sdpa"
        self.plain, self.exact = copy.deepcopy(self.model), copy.deepcopy(self.model).double()
        self.prompts = [split_rows(each, self.model.config)[0] for each in self.inputs]  # as the engine takes them

    def truth(self, prompt: int, path: tuple[int, ...]) -> tuple[torch.Tensor, float]:
        """The log-probs of ``path`` in float64, and the largest error of SDPA in float32."""
        if (prompt, path) not in self.known:
            truth, plain = (logprobs(model, self.inputs[prompt], path) for model in (self.exact, self.plain))
            self.known[prompt, path] = truth, float((plain - truth).abs().max())
        return self.known[prompt, path]

    def engine(self, **config: Any) -> Engine:
        return Engine(self.model, TAGS, config=EngineConfig(canary=True, **config))


def logprobs(model, prompt, path) -> torch.Tensor:
    """By transformers alone, float64 [len(path)]."""
    length = prompt["input_ids"].shape[1]
    ids = torch.cat([prompt["input_ids"], torch.tensor([path])], 1)
    inputs = {**prompt, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "mm_token_type_ids" in prompt:  # of text for all that follows
        inputs["mm_token_type_ids"] = torch.nn.functional.pad(prompt["mm_token_type_ids"], (0, len(path)))
    if "cross_attention_mask" in prompt:
        mask = prompt["cross_attention_mask"]
        inputs["cross_attention_mask"] = torch.cat([mask, mask[:, -1:].expand(-1, len(path), -1, -1)], 1)
    inputs["pixel_values"] = prompt["pixel_values"].to(model.dtype)
    with torch.inference_mode():
        logits = model(**inputs).logits[0, length - 1 : -1].double()
    return logits.log_softmax(-1).gather(1, torch.tensor(path).unsqueeze(1)).squeeze(1)


@pytest.fixture(scope="module", params=["mllama", "qwen2_5_vl"])
def world(request) -> World:
    if request.param == "mllama":
        model = build_random_mllama(**TINY_SHAPE, seed=0)
        prompts = [random_inputs(model, length=9 + 4 * i, ratio_id=1 + 5 * (i % 2), seed=i) for i in range(PROMPTS)]
    else:
        build, make_inputs = FAMILIES[request.param]
        model = build(seed=0)
        prompts = [make_inputs(model, length=19 + 3 * i, seed=i) for i in range(PROMPTS)]
    rng = random.Random(5)
    paths = []
    for _ in range(PROMPTS):
        common = tuple(rng.randrange(3, 90) for _ in range(SHARED))
        paths.append([common + tuple(rng.randrange(3, 90) for _ in range(PATH - SHARED)) for _ in range(PATHS)])
    return World(model, prompts, paths)


class Reader:
    """Runs a program on a session of its own, whose owner stalls before each request."""

    failure: Exception | None = None

    def __init__(self, engine: Engine, inputs: dict[str, torch.Tensor], program: Callable[[int], Program]) -> None:
        self.session = engine.open(inputs)
        self.program = program(self.session.root)
        self.result: Found | None = None
        self.is_asking = False
        self._go_on(None)

    def tick(self) -> None:
        if self.is_asking or self.result is not None:
            return
        if self.stall > 0:
            self.stall -= 1
        else:
            self.is_asking = True
            self.session.ask(self.requests, self._receive)

    def _receive(self, replies: Any) -> None:
        if isinstance(replies, Exception):
            self.failure = replies
            return
        self.is_asking = False
        self._go_on(replies)

    def _go_on(self, replies: Any) -> None:
        try:
            self.stall, self.requests = self.program.send(replies)
        except StopIteration as stop:
            self.result = stop.value
            self.session.close()


def go(engine: Engine, readers: Sequence[Reader]) -> list[Found]:
    """Step until all have ended."""
    for _ in range(5_000):
        for reader in readers:
            reader.tick()
            if reader.failure:
                raise reader.failure
        if all(reader.result is not None for reader in readers):
            break
        engine.step()
    return [reader.result for reader in readers]  # type: ignore[misc]


def run(engine: Engine, readers: Sequence[Reader]) -> list[Found]:
    found = go(engine, readers)
    assert (engine.pages_in_use, engine.pool.num_sequences, engine.images_in_use) == (0, 0, 0)
    return found


def read(paths, rng: random.Random, root: int) -> Program:
    """Read ``paths`` in random cuts, one or more of them at a time. What they share is read once, or once for each."""
    ends, found = dict.fromkeys(paths, root), {path: () for path in paths}
    if rng.random() < 0.5:
        ((given,),) = yield rng.randrange(3), [Extend(root, paths[0][:SHARED])]
        ends, found = dict.fromkeys(paths, given.id), dict.fromkeys(paths, given.logprobs)
    while growing := [path for path in paths if len(found[path]) < len(path)]:
        some = rng.sample(growing, rng.randrange(1, len(growing) + 1))
        requests = [Extend(ends[path], path[len(found[path]) :][: rng.randrange(1, 12)]) for path in some]
        replies = yield rng.choice([0, 0, 2, 9]), requests
        for path, (given,) in zip(some, replies):
            ends[path], found[path] = given.id, found[path] + given.logprobs
    return [*found.items()]


def grow(rng: random.Random, root: int) -> Program:
    """Draw candidates, whose seeds say which; the second time all of them are drafted if anything is."""
    (first,) = yield rng.randrange(4), [Expand(root, (1, 2, 3), MILD, 13, NO_TAG)]
    (again,) = yield rng.randrange(4), [Expand(root, (1, 2, 3), MILD, 13, NO_TAG)]
    (longer,) = yield rng.randrange(4), [Expand(first[0].id, (4, 5), MILD, 9, NO_TAG)]
    return [
        *((kid.tokens, kid.logprobs) for kid in (*first, *again)),
        *((first[0].tokens + kid.tokens, kid.logprobs) for kid in longer),
    ]


def assert_as_good_as_sdpa(world: World, prompt: int, found: Found) -> None:
    for path, values in found:
        truth, error = world.truth(prompt, path)
        own = (torch.tensor(values, dtype=torch.float64) - truth[len(truth) - len(values) :]).abs().max()
        assert own <= 2 * error + FLOOR, (prompt, path)


def schedule(world: World, rng: random.Random, tally: Counter) -> None:
    page_size = rng.choice([1, 3, 16])
    one = (PATHS * PATH + 30) // page_size + 2 * PATHS * PATH // page_size + 12  # room for any of them alone
    config = {
        "page_size": page_size,
        "num_pages": int(one * rng.choice([1, 1.3, 2, 8])),
        "steps_per_look": rng.choice([1, 3]),
        "draft_tokens": rng.choice([0, 4]),
    }
    engine = world.engine(**config)
    engine.runner.replays = rng.random() < 0.3  # as on CUDA
    kinds = [(prompt, partial(read, world.paths[prompt], rng)) for prompt in range(PROMPTS)]
    kinds = rng.sample(kinds, rng.randrange(1, PROMPTS + 1))
    kinds += [(rng.randrange(PROMPTS), partial(grow, rng)) for _ in range(rng.randrange(4))]
    readers = [Reader(engine, world.prompts[prompt], program) for prompt, program in kinds]
    for (prompt, _), reader, found in zip(kinds, readers, run(engine, readers), strict=True):
        assert_as_good_as_sdpa(world, prompt, found)
        usage = reader.session.usage
        tally["preempted"] += reader.session._job.was_paused
        tally["computed again"] += usage.recomputed_tokens > 0
        tally["drafts accepted"] += usage.accepted_tokens > 0
        tally["drafts rejected"] += usage.drafted_tokens > usage.accepted_tokens
    tally["windows"] += bool(engine.window.captured)
    tally["replays"] += bool(engine.runner.replay.captured)


def test_random_schedules_are_as_good_as_sdpa(world):
    tally: Counter = Counter()
    for seed in range(SCHEDULES):
        try:
            schedule(world, random.Random(seed), tally)
        except Exception as error:
            error.add_note(f"in schedule {seed}")
            raise
    for kind in ("preempted", "computed again", "drafts accepted", "drafts rejected", "windows", "replays"):
        assert tally[kind] >= 2, f"{kind}: {tally}"


def in_fixed_cuts(paths, cuts: Sequence[int], stalls: Sequence[int], root: int) -> Program:
    """Read ``paths`` side by side, each in these cuts."""
    ends, found, start = [root for _ in paths], [() for _ in paths], 0
    for cut, stall in zip(cuts, stalls, strict=True):
        replies = yield stall, [Extend(end, path[start : start + cut]) for path, end in zip(paths, ends)]
        start += cut
        ends = [given.id for (given,) in replies]
        found = [before + given.logprobs for before, (given,) in zip(found, replies)]
    return [*zip(paths, found)]


CUTS = (1, 8, 3, 13, 1)
assert sum(CUTS) == PATH


@pytest.mark.parametrize("replays", [False, True])
def test_at_one_fixed_shape_bit_for_bit(world, replays):
    """The same batches and cuts; other pages, which others have used before, other settings, and stalls."""

    def read_all(engine: Engine, stalls: Sequence[int]) -> list[Found]:
        programs = [partial(in_fixed_cuts, paths, CUTS, stalls) for paths in world.paths]
        return run(engine, [Reader(engine, *each) for each in zip(world.prompts, programs)])

    def open_engine(**config: Any) -> Engine:
        engine = world.engine(**{"page_size": 4, "num_pages": 400, **config})
        engine.runner.replays = replays
        return engine

    expected = read_all(open_engine(draft_tokens=0, steps_per_look=1), [0] * len(CUTS))
    for prompt, found in enumerate(expected):
        assert_as_good_as_sdpa(world, prompt, found)
    rng = random.Random(7)
    for config in ({"page_size": 1}, {"page_size": 3}, {"page_size": 16}, {"steps_per_look": 3}, {"draft_tokens": 4}):
        engine = open_engine(**config)
        run(engine, [Reader(engine, world.prompts[0], partial(grow, rng)) for _ in range(2)])
        assert read_all(engine, [rng.randrange(9) for _ in CUTS]) == expected, config


def test_evicted_and_preempted_between_its_passes_bit_for_bit(world):
    """Each pass is its own, as are those in which its keys and values are computed again."""
    prompt, path = world.prompts[1], world.paths[1][0]
    alone = partial(in_fixed_cuts, [path], CUTS, [0] * len(CUTS))
    roomy, tight = world.engine(page_size=2, num_pages=400), world.engine(page_size=2, num_pages=56)
    (expected,) = run(roomy, [Reader(roomy, prompt, alone)])
    reader = Reader(tight, prompt, alone)
    while reader.result is None:
        reader.tick()
        while reader.is_asking:
            tight.step()
        go(tight, [Reader(tight, inputs, partial(grow, random.Random(1))) for inputs in world.prompts[1:]])
    assert reader.session._job.was_paused and reader.session.usage.recomputed_tokens > len(path)
    assert reader.result == expected
    assert tight.pages_in_use == 0
