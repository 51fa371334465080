"""Drafts and shared rows change how many passes and rows a search takes, and nothing that it draws."""

import copy
import random
from dataclasses import replace

import pytest
import torch
from helpers.jobs import Job, run
from helpers.random_llava import FAMILIES
from helpers.random_mllama import random_inputs

from llava_cot import BestOfNConfig, EngineConfig, SampleConfig, SentenceBeamConfig, SwiresConfig, SwiresGenerator
from llava_cot.core import Expand, Limit, SamplingParams
from llava_cot.data import shapes
from llava_cot.engine.drafts import Drafts
from llava_cot.engine.engine import Engine
from llava_cot.engine.history import LONGEST_MATCH, MOST_PLACES, SHORTEST_MATCH, History
from llava_cot.prompt import split_rows
from llava_cot.search.budget import Budget
from llava_cot_kernels.stage_tags import StageTags

SAMPLES = [shapes.sample(seed) for seed in range(808_000, 808_003)]
TAGS = StageTags([b"a", b"b</", b"x>", b"</x", b">c"] * 20, ["</x>"])
WILD = SamplingParams(temperature=1.2)
NO_TAG: frozenset[int] = frozenset()
SEEDS = (1, 2, 3)


def again(length, limit=None):
    """Draw the same candidates twice: the second time everything is known."""

    def program(root):
        (first,) = yield [Expand(root.id, SEEDS, WILD, length, NO_TAG)]
        (second,) = yield [Expand(root.id, SEEDS, WILD, length, NO_TAG, limit=limit)]
        return [*first, *second]

    return program


def job_of(model, program, seed=0):
    inputs = random_inputs(model, length=11, ratio_id=6, seed=seed)
    return Job(split_rows(inputs, model.config)[0], program)


def run_with(model, program, draft_tokens, **config):
    settings = {"page_size": 4, "num_pages": 400, **config}
    engine = Engine(model, TAGS, config=EngineConfig(draft_tokens=draft_tokens, **settings))
    run(engine, [job := job_of(model, program)])
    assert job.error is None and engine.pages_in_use == 0
    return job


def drawn(job):
    return [(found.tokens, found.finish) for found in job.result]


@pytest.mark.parametrize("seed", range(20))
def test_a_draft_is_what_follows_the_longest_agreeing_suffix(seed):
    rng = random.Random(seed)
    history, texts = History(), []
    for _ in range(rng.randrange(1, 6)):
        before = [rng.randrange(3) for _ in range(rng.randrange(6))]
        tokens = [rng.randrange(3) for _ in range(rng.randrange(1, 6))]
        history.add(before, tokens)
        texts.append((before, tokens))
    known = []  # (tokens before, tokens behind) of every place that can be found, the latest first
    for before, tokens in reversed(texts):
        whole = before + tokens
        known += [
            (whole[:at], whole[at:]) for at in range(len(whole), -1, -1) if at >= max(len(before), SHORTEST_MATCH)
        ]
    for _ in range(50):
        text, most = [rng.randrange(3) for _ in range(rng.randrange(8))], rng.randrange(1, 5)
        fits = [(start, behind) for start, behind in known if start[-SHORTEST_MATCH:] == text[-SHORTEST_MATCH:]]
        agree = [agreement(text, start) for start, _ in fits[:MOST_PLACES]] if len(text) >= SHORTEST_MATCH else []
        expected = fits[agree.index(max(agree))][1][:most] if agree else []
        assert history.draft(text, most) == expected


def agreement(text, start):
    length = 0
    while length < min(len(text), len(start), LONGEST_MATCH) and text[-1 - length] == start[-1 - length]:
        length += 1
    return length


def test_a_history_without_a_match_drafts_nothing():
    history = History()
    assert history.draft([], 4) == history.draft([1], 4) == history.draft([1, 2], 4) == []
    history.add((), (1, 2, 3))
    assert history.draft([2, 3], 4) == []  # the text ends there
    assert history.draft([1, 2], 0) == []
    history.add((3,), (1, 2))
    assert history.draft([3, 1], 4) == [2]  # and no text runs into the next


@pytest.mark.parametrize("config", [{}, {"steps_per_look": 3}, {"num_pages": 30}, {"page_size": 1, "num_pages": 100}])
@pytest.mark.parametrize("draft_tokens", [1, 3, 8, 64])
def test_what_was_drawn_before_is_drawn_again_in_fewer_passes(random_model, draft_tokens, config):
    plain, drafted = (run_with(random_model, again(23), n, **config) for n in (0, draft_tokens))
    assert drawn(drafted) == drawn(plain)
    assert drafted.usage.generated_tokens == plain.usage.generated_tokens
    assert drafted.usage.accepted_tokens > 0
    assert drafted.usage.steps <= plain.usage.steps
    if draft_tokens >= 8 and not config:
        assert drafted.usage.steps < 0.75 * plain.usage.steps
    assert plain.usage.drafted_tokens == plain.usage.accepted_tokens == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family):
    build, make_inputs = FAMILIES[family]
    model = build(seed=0)
    inputs = split_rows(make_inputs(model, length=21, seed=0), model.config)[0]
    found = []
    for draft_tokens in (0, 8):
        engine = Engine(model, TAGS, config=EngineConfig(page_size=4, num_pages=400, draft_tokens=draft_tokens))
        run(engine, [job := Job(inputs, again(19))])
        assert job.error is None
        found.append(job)
    assert drawn(found[0]) == drawn(found[1])
    assert found[1].usage.accepted_tokens > 0 and found[1].usage.steps < found[0].usage.steps


def test_rows_of_a_draft_as_sequences_of_their_own(random_model):
    """As on CUDA, where captured passes have one token of each sequence."""
    jobs = []
    for replays in (False, True):
        engine = Engine(random_model, TAGS, config=EngineConfig(page_size=4, num_pages=400, draft_tokens=8))
        engine.runner.replays = replays
        run(engine, [job := job_of(random_model, again(23))])
        assert job.error is None and bool(engine.runner.replay.captured) == replays
        jobs.append(job)
    assert drawn(jobs[0]) == drawn(jobs[1])
    assert replace(jobs[0].usage, seconds=0) == replace(jobs[1].usage, seconds=0)


class Given(Drafts):
    """Drafts ``tokens`` behind those of every candidate."""

    def __init__(self, tokens):
        super().__init__(8)
        self.tokens = tokens

    def propose(self, jobs):
        slots = [slot for job in jobs for slot in job.slots if slot.branch.tokens and slot.branch.twin is None]
        drafts = {slot.branch: self.tokens(slot.branch) for slot in slots}
        most = {slot.branch: slot.request.max_new_tokens - len(slot.branch.tokens) - 1 for slot in slots}
        return {branch: draft[: most[branch]] for branch, draft in drafts.items() if most[branch]}


def spoil(model, token):
    """A copy of ``model`` that computes NaN for ``token``."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = torch.nan
    return model


@pytest.mark.parametrize("replays", [False, True])
def test_a_wrong_draft_that_makes_nan_fails_nobody(random_model, replays):
    plain = run_with(random_model, again(9), 0)
    prompt = plain.inputs["input_ids"][0].tolist()
    unused = next(token for token in range(97) if token not in {*prompt, *(t for b in plain.result for t in b.tokens)})
    engine = Engine(spoil(random_model, unused), TAGS, config=EngineConfig(page_size=4, num_pages=400, canary=True))
    engine.runner.replays = replays
    known = {branch.id: branch.tokens for branch in plain.result}
    engine.drafts = Given(lambda branch: [*known[branch.id][len(branch.tokens) :][:2], unused, unused])
    run(engine, [job := job_of(engine._model, again(9))])
    assert job.error is None and drawn(job) == drawn(plain)
    engine.drafts = Given(lambda branch: [*known[branch.id][len(branch.tokens) :]])
    run(engine, [job := job_of(engine._model, again(9))])
    assert drawn(job) == drawn(plain) and job.usage.accepted_tokens > 0  # as before, of what the pages hold now


def test_a_right_draft_that_makes_nan_fails_where_its_search_would(random_model):
    def program(root):
        (found,) = yield [Expand(root.id, (1,), WILD, 20, NO_TAG)]
        return found

    (branch,) = run_with(random_model, program, 0).result
    model, errors = spoil(random_model, branch.tokens[-2]), []
    for tokens in (lambda _: [], lambda own: branch.tokens[len(own.tokens) :]):
        engine = Engine(model, TAGS, config=EngineConfig(page_size=4, num_pages=400))
        engine.drafts = Given(tokens)
        run(engine, [job := job_of(model, program)])
        assert isinstance(job.error, ValueError) and engine.pages_in_use == 0
        errors.append((str(job.error), job.usage.generated_tokens))
    assert errors[0] == errors[1]


def test_what_was_computed_adds_up(random_model):
    """Whatever was drafted or shared, a search accounts for each token that it would compute without either."""

    def program(root):
        (first,) = yield [Expand(root.id, (1, 1, 2, 3), WILD, 13, NO_TAG)]
        for params in (SamplingParams(temperature=0.0), WILD):
            yield [Expand(root.id, (1, 1, 2, 3), params, 13, NO_TAG)]
        (back,) = yield [Expand(first[3].id, (4, 4), SamplingParams(temperature=0.4), 5, NO_TAG)]
        return [*first, *back]

    def computed(usage):
        return usage.decoded_tokens + usage.shared_tokens - usage.drafted_tokens + usage.accepted_tokens

    settings = ((0, {}), (8, {}), (2, {"steps_per_look": 3}), (8, {"num_pages": 18}))
    usages = [run_with(random_model, program, count, **config).usage for count, config in settings]
    assert len({computed(usage) for usage in usages}) == 1
    assert len({usage.decoded_tokens for usage in usages}) > 1 and usages[-1].recomputed_tokens > 0


def test_nothing_is_looked_up_where_candidates_fill_the_pass(random_model):
    engine = Engine(random_model, TAGS, config=EngineConfig(page_size=4, num_pages=1000, draft_tokens=8))
    engine.drafts.most_rows = 1
    found = []
    engine.drafts.note = lambda job, branch: found.append(job.history)
    run(engine, [job_of(random_model, again(9))])
    assert found == [None] * 6


def test_the_history_goes_with_its_search(random_model):
    assert run_with(random_model, again(9), 8).inner.history is None


def test_the_cost_of_a_draft_does_not_grow_with_repetition():
    class Counted(list):
        reads = 0

        def __getitem__(self, at):
            self.reads += 1
            return super().__getitem__(at)

    history, text = History(), Counted([5] * LONGEST_MATCH)
    history.add((), [5] * 10_000)
    assert history.draft(text, 4) == []  # behind the last of them
    history.add((), [5] * 40 + [7])
    text.reads = 0
    history.draft(text, 4)
    assert text.reads <= LONGEST_MATCH


def test_a_budget_stops_all_where_it_would_without_drafts(random_model):
    """For every number of tokens: nobody gets ahead of the place where all have to stop."""
    first = 3 * 12
    for left in range(1, first + 2):
        limit = Limit(generated_tokens=first + left)
        plain, drafted = (run_with(random_model, again(12, limit), n) for n in (0, 8))
        assert drawn(drafted) == drawn(plain), left
        assert drafted.usage.generated_tokens == plain.usage.generated_tokens
    assert drafted.usage.accepted_tokens > 0


def test_siblings_with_the_same_tokens_are_computed_once(random_model):
    """Greedy candidates never part, so that four take the rows of one; all can be grown on."""

    def program(root, width):
        (found,) = yield [Expand(root.id, tuple(range(width)), SamplingParams(temperature=0.0), 9, NO_TAG)]
        grown = yield [Expand(each.id, (5, 6), WILD, 4, NO_TAG) for each in found]
        return [*found, *(kid for kids in grown for kid in kids)]

    one = run_with(random_model, lambda root: program(root, 1), 0)
    four = run_with(random_model, lambda root: program(root, 4), 0)
    assert [found.tokens for found in four.result[:4]] == [one.result[0].tokens] * 4
    assert [found.tokens for found in four.result[4:]] == [found.tokens for found in one.result[1:]] * 4
    assert four.usage.shared_tokens >= 3 * 8
    again_alone = four.usage.decoded_tokens - one.usage.decoded_tokens
    assert again_alone <= 3 * (1 + 2 * 3)  # the last token of each, and what their own candidates drew


@pytest.mark.parametrize("model", ["tiny", "tiny-qwen"])
@pytest.mark.parametrize(
    "search",
    [
        SampleConfig(num_return_sequences=3, temperature=0.4),
        BestOfNConfig(n=3, temperature=0.4),
        SentenceBeamConfig(candidates=3, keep=2),
        SwiresConfig.published(cutoff=0.0),
        SwiresConfig.published(cutoff=0.0, budget=Budget(generated_tokens=250)),
    ],
    ids=["sample", "best_of_n", "sentence_beam", "swires", "budget"],
)
def test_searches_draw_the_same(model, search):
    answers = []
    for draft_tokens in (0, 8):
        generator = SwiresGenerator.from_pretrained(model, engine=EngineConfig(draft_tokens=draft_tokens))
        images, questions = [sample.image for sample in SAMPLES], [sample.question for sample in SAMPLES]
        answers.append(generator.answer_batch(images, questions, search, seed=3, max_new_tokens=120))
    for plain, drafted in zip(*answers, strict=True):
        for one, other in zip(plain.trace.data["nodes"], drafted.trace.data["nodes"], strict=True):
            assert (one["tokens"], one["finish"], one["kept"]) == (other["tokens"], other["finish"], other["kept"])
        assert plain.trace.data["answer"] == drafted.trace.data["answer"]
        assert plain.usage.generated_tokens == drafted.usage.generated_tokens
        if type(search) is SwiresConfig:
            assert drafted.usage.steps < plain.usage.steps


def test_logits_processors_see_the_draft(tiny):
    """A penalty depends on every token before: also on those of the draft."""
    model = copy.deepcopy(tiny.model)
    model.generation_config.repetition_penalty = 1.2
    sample, found = SAMPLES[0], []
    for draft_tokens in (0, 8):
        generator = SwiresGenerator(model, tiny.processor, engine=EngineConfig(draft_tokens=draft_tokens))
        search = SwiresConfig.published(cutoff=0.0, max_new_tokens=60)
        found.append(generator.answer(sample.image, sample.question, search, seed=1))
    assert [node["tokens"] for node in found[0].trace.data["nodes"]] == [
        node["tokens"] for node in found[1].trace.data["nodes"]
    ]
    assert found[1].usage.accepted_tokens > 0


def test_large_models_draft_nothing_on_the_cpu_unless_asked(monkeypatch, random_model):
    monkeypatch.setattr("llava_cot.engine.engine.threads_for", lambda *given: None)
    assert Engine(random_model, TAGS).drafts.most_tokens == 0
    assert Engine(random_model, TAGS, config=EngineConfig(draft_tokens=3)).drafts.most_tokens == 3


def test_a_negative_number_is_refused():
    with pytest.raises(ValueError, match="draft_tokens must be >= 0, got -1"):
        EngineConfig(draft_tokens=-1)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
