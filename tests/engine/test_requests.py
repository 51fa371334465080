"""What a program may ask for, request by request: each is right, and what goes wrong stays where it went wrong."""

import copy
import itertools
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from helpers.jobs import Job, run, steps
from helpers.random_mllama import TINY_SHAPE, build_random_mllama, random_inputs

from llava_cot import BestOfNConfig, SentenceBeamConfig
from llava_cot.core import Call, Expand, Extend, Finish, Limit, Release, SamplingParams
from llava_cot.data import shapes
from llava_cot.engine.config import EngineConfig
from llava_cot.engine.engine import Engine
from llava_cot.prompt import build_inputs, split_rows
from llava_cot.scoring import confidence
from llava_cot_kernels import OutOfPages
from llava_cot_kernels.stage_tags import StageTags

GREEDY = SamplingParams(temperature=0.0)
WILD = SamplingParams(temperature=1.2)
NO_TAG: frozenset[int] = frozenset()
FOUR_TILES = 6  # aspect ratio id: 2 x 2
PAGE_SIZES = (1, 4, 16)


@dataclass
class Subject:
    """A model, a twin of it that no engine has seen, and what they are asked."""

    model: Any
    untouched: Any
    prompts: list[dict[str, torch.Tensor]]
    tags: StageTags
    known: dict[tuple, torch.Tensor] = field(default_factory=dict)  # a path's logits: page sizes change no path
    alone: dict[int, list[int]] = field(default_factory=dict)  # what growing(1, 9) draws by itself, by prompt

    def engine(self, page_size=4, num_pages=None):
        return Engine(self.model, self.tags, config=EngineConfig(page_size=page_size, num_pages=num_pages))

    def job(self, program, prompt=0):
        return Job(split_rows(self.prompts[prompt], self.model.config)[0], program)

    def logits(self, branch, prompt=0):
        """[len(branch.tokens) + 1, V]: what transformers computes before each token of ``branch`` and behind it."""
        path = tuple(branch.path())
        if (prompt, path) not in self.known:
            self.known[prompt, path] = self._logits(self.prompts[prompt], path)
        return self.known[prompt, path][-len(branch.tokens) - 1 :]

    def _logits(self, inputs, path):
        """[1 + len(path), V]: computed anew by the model that no engine has seen."""
        ids = torch.cat([inputs["input_ids"], torch.tensor([path])], dim=1)
        mask = inputs["cross_attention_mask"]
        mask = torch.cat([mask, mask[:, -1:].expand(-1, len(path), -1, -1)], dim=1)
        whole = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids), "cross_attention_mask": mask}
        with torch.inference_mode():
            return self.untouched(**whole).logits[0, -len(path) - 1 :]

    def drawn_alone(self, prompt):
        """The tokens of ``growing(1, 9)`` in an engine of its own."""
        if prompt not in self.alone:
            job, engine = self.job(growing(1, 9), prompt), self.engine()
            run(engine, [job])
            assert job.error is None
            self.alone[prompt] = job.result.tokens
        return self.alone[prompt]

    def assert_right(self, branch, prompt=0):
        """Its log-probs, and its next logits where it has been computed so far."""
        logits = self.logits(branch, prompt)
        expected = logits[:-1].log_softmax(-1).gather(1, torch.tensor(branch.tokens)[:, None])[:, 0]
        assert branch.logprobs == pytest.approx(expected.tolist(), abs=1e-4)
        if branch.next_logits is not None:
            torch.testing.assert_close(branch.next_logits, logits[-1], atol=1e-4, rtol=0)


@pytest.fixture(scope="module", params=["tiny", "four tiles"])
def subject(request, tiny, fresh_tiny, random_model):
    if request.param == "tiny":
        samples = [shapes.sample(seed) for seed in range(804_000, 804_004)]
        prompts = [dict(build_inputs(tiny.processor, s.image, s.question, "one")) for s in samples]
        return Subject(tiny.model, fresh_tiny, prompts, tiny.engine.tags)
    prompts = [random_inputs(random_model, length=15 + i, ratio_id=FOUR_TILES, seed=i) for i in range(4)]
    return Subject(random_model, build_random_mllama(**TINY_SHAPE, seed=0), prompts, tiny.engine.tags)


def assert_nothing_held(engine):
    assert (engine.pages_in_use, engine.pool.num_sequences, engine.images_in_use) == (0, 0, 0)


def growing(seed, tokens, params=WILD):
    """A program of one branch."""

    def program(root):
        ((branch,),) = yield [Expand(root.id, (seed,), params, tokens, NO_TAG)]
        return branch

    return program


def keep_logits(branch):
    """``branch`` as it is now: the engine forgets the logits of a job that ends."""
    return copy.copy(branch)


# --- Extend ---


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_given_tokens_are_as_if_recomputed(subject, page_size):
    """From the root, from branches that nobody computed and that somebody did, and beside jobs that decode."""
    given, other = (11, 12, 13, 14, 15), (21, 22)

    def program(root):
        (first,) = yield [Expand(root.id, (1, 2), WILD, 6, NO_TAG)]
        assert first[0].next_logits is None
        # Two extensions of one fresh branch, one of the root, and a branch that is expanded in the same step.
        (a,), (b,), (c,), (d,) = yield [
            Extend(first[0].id, given),
            Extend(first[0].id, other),
            Extend(root.id, given),
            Expand(first[1].id, (3,), WILD, 5, NO_TAG),
        ]
        assert first[1].next_logits is not None
        (e,), (f,), grown = yield [
            Extend(first[1].id, other),  # whose logits are kept
            Extend(a.id, other),
            Expand(a.id, (4, 5), WILD, 5, NO_TAG),
        ]
        (last,) = yield [Expand(f.id, (6,), GREEDY, 6, NO_TAG)]
        return [*map(keep_logits, (*first, a, b, c, d, e, f)), *grown, *last]

    neighbours = [(growing(seed, 4 + 5 * seed), seed) for seed in (1, 2, 3)]
    jobs = [subject.job(program), *itertools.starmap(subject.job, neighbours)]
    engine = subject.engine(page_size)
    run(engine, jobs)
    for branch in jobs[0].result:
        subject.assert_right(branch)
    last = jobs[0].result[-1]
    assert last.tokens == subject.logits(last)[:-1].argmax(-1).tolist()
    for job, (neighbour, prompt) in zip(jobs[1:], neighbours):
        alone = subject.job(neighbour, prompt)
        run(engine, [alone])
        assert job.result.tokens == alone.result.tokens
        subject.assert_right(job.result, prompt)
    assert_nothing_held(engine)


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_any_number_of_given_tokens(subject, page_size):
    """Around page boundaries; two extensions in a row are one."""
    lengths = (1, 2, 3, 4, 5, 15, 16, 17, 33)
    given = tuple(3 + (7 * i) % 80 for i in range(max(lengths)))

    def program(root):
        replies = yield [Extend(root.id, given[:length]) for length in lengths]
        branches = [branch for (branch,) in replies]
        ((rest,),) = yield [Extend(branches[3].id, given[lengths[3] :])]
        return [keep_logits(branch) for branch in (*branches, rest)]

    job, engine = subject.job(program), subject.engine(page_size)
    run(engine, [job])
    *branches, rest = job.result
    for branch, length in zip(branches, lengths):
        assert (branch.tokens, branch.length) == ([*given[:length]], job.prompt_length + length)
        subject.assert_right(branch)
    subject.assert_right(rest)
    torch.testing.assert_close(rest.next_logits, branches[-1].next_logits, atol=1e-4, rtol=0)
    assert job.usage.prompt_tokens == job.prompt_length + sum(lengths) + max(lengths) - lengths[3]
    assert (job.usage.decoded_tokens, job.usage.steps) == (0, 2)
    assert_nothing_held(engine)


def test_a_tag_that_given_tokens_begin(tiny):
    """Half of a closing tag is given, the rest is drawn: the branch ends there."""
    sample, encode = shapes.sample(804_010), tiny.processor.tokenizer
    answer = tiny.answer(sample.image, sample.question, "greedy", max_new_tokens=120)
    close = next(at for at in range(len(answer.tokens)) if "</SUMMARY>" in encode.decode(answer.tokens[: at + 1])) + 1
    given = tuple(answer.tokens[: close - 1])
    assert encode.decode(given).count("</") == 1, "the tag must be several tokens"

    def program(root):
        ((half,),) = yield [Extend(root.id, given)]
        ((rest,),) = yield [Expand(half.id, (0,), GREEDY, 20)]
        return rest

    job = Job(dict(build_inputs(tiny.processor, sample.image, sample.question, "one")), program)
    run(tiny.engine, [job])
    assert (job.result.tokens, job.result.finish, job.result.tag) == (answer.tokens[close - 1 : close], Finish.TAG, 0)


def test_too_many_given_tokens(subject):
    """More than the cache holds: that job fails, and one beside it does not notice."""

    def program(root):
        yield [Extend(root.id, (5,) * 200)]

    alone, engine = subject.job(growing(1, 20), 1), subject.engine(4, num_pages=24)
    run(engine, [alone])
    for order in (1, -1):
        jobs = [subject.job(program), subject.job(growing(1, 20), 1)]
        run(engine, jobs[::order])
        assert isinstance(jobs[0].error, OutOfPages) and jobs[1].error is None
        assert jobs[1].result.tokens == alone.result.tokens
        assert_nothing_held(engine)


# --- Call ---


def test_calls_of_equal_functions_are_one(subject):
    """The items of all searches at once and in their order; another function is another call."""
    seen = []

    class Doubler:
        def double(self, items):
            seen.append(items)
            return [2 * item for item in items]

    doubler, engine = Doubler(), subject.engine()

    def negate(items):
        seen.append(items)
        return (-item for item in items)

    def program(numbers):
        def run(root):
            # A bound method is a new object each time, but equal.
            doubled, (branch,), negated = yield [
                Call(doubler.double, numbers),
                Expand(root.id, (1,), WILD, 5, NO_TAG),
                Call(negate, numbers[:1]),
            ]
            (nothing,) = yield [Call(doubler.double, [])]
            return doubled, len(branch.tokens), negated, nothing

        return run

    jobs = [subject.job(program([10 * i, 10 * i + 1, 10 * i + 2]), i) for i in range(3)]
    run(engine, jobs)
    for i, job in enumerate(jobs):
        assert job.result == ([20 * i, 20 * i + 2, 20 * i + 4], 5, [-10 * i], [])
        assert job.usage.steps == 5  # host work is no forward pass
    assert seen == [[0, 1, 2, 10, 11, 12, 20, 21, 22], [0, 10, 20], []]
    assert_nothing_held(engine)


@pytest.mark.parametrize(
    "spoil, error, message",
    [
        (lambda items: 1 / 0, ZeroDivisionError, "division"),
        (lambda items: items[1:], ValueError, "must return one result per item, got 1"),
        (lambda items: [*items, 0], ValueError, "must return one result per item, got 3"),
        (lambda items: None, TypeError, "not iterable"),
    ],
    ids=["raises", "one too few", "one too many", "nothing"],
)
def test_a_call_fails_where_its_items_are(subject, spoil, error, message):
    calls = 0

    def function(items):
        nonlocal calls
        calls += 1
        return spoil(items) if -1 in items else [item + 1 for item in items]

    def program(numbers, catches=False):
        def run(root):
            try:
                ((branch,), results) = yield [Expand(root.id, (1,), WILD, 4, NO_TAG), Call(function, numbers)]
            except error:
                if not catches:
                    raise
                ((branch,),) = yield [Expand(root.id, (2,), WILD, 4, NO_TAG)]  # it may go on
                results = None
            return len(branch.tokens), results

        return run

    asked = [([1, 2], False), ([-1, 2], False), ([3], False), ([-1, 4], True)]
    jobs, engine = [subject.job(program(*one), prompt) for prompt, one in enumerate(asked)], subject.engine()
    run(engine, jobs)
    assert [job.result for job in jobs] == [(4, [2, 3]), None, (4, [4]), (4, None)]
    assert [type(job.error) for job in jobs] == [type(None), error, type(None), type(None)]
    assert message in str(jobs[1].error)
    assert calls == 1 + 4  # together, then each alone
    assert_nothing_held(engine)


# --- limit ---


@pytest.mark.parametrize("steps", [1, 3, 7])
def test_a_limit_cuts_within_a_step(subject, steps):
    """Every continuation of its request and no other; one that has just ended has ended for its own reason."""
    width = 5 if steps > 1 else 6  # tokens that the search draws in a step
    limit = Limit(generated_tokens=width * steps)

    def program(root):
        stopped, others, short = yield [
            Expand(root.id, (1, 2, 3), WILD, 12, NO_TAG, limit=limit),
            Expand(root.id, (1, 4), WILD, 12, NO_TAG, limit=Limit(generated_tokens=10**6)),
            Expand(root.id, (5,), WILD, steps, NO_TAG, limit=limit) if steps == 1 else Extend(root.id, (5,)),
        ]
        (again,) = yield [Expand(stopped[0].id, (6,), WILD, 3, NO_TAG)]
        return stopped, others, short, again[0]

    engine, jobs = subject.engine(), [subject.job(program), subject.job(growing(1, 12), 1)]
    run(engine, jobs)
    stopped, others, short, again = jobs[0].result
    ended = [eos.finish for eos in (*stopped, *others) if eos.finish is Finish.EOS]
    assert not ended, "choose other seeds"
    assert {(branch.finish, len(branch.tokens)) for branch in stopped} == {(Finish.STOPPED, steps)}
    assert {(branch.finish, len(branch.tokens)) for branch in others} == {(Finish.LENGTH, 12)}
    assert stopped[0].tokens == others[0].tokens[:steps]
    if steps == 1:
        assert short[0].finish is Finish.LENGTH
    subject.assert_right(again)
    alone = subject.job(growing(1, 12), 1)
    run(engine, [alone])
    assert jobs[1].result.tokens == alone.result.tokens
    assert_nothing_held(engine)


# --- trims ---


@pytest.fixture(scope="module")
def greedy_batch(tiny):
    """Images, questions and their greedy answers."""
    samples = [shapes.sample(seed) for seed in range(804_020, 804_027)]
    images, questions = [s.image for s in samples], [s.question for s in samples]
    return images, questions, tiny.answer_batch(images, questions, "greedy", max_new_tokens=120)


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_greedy_sentence_by_sentence_is_greedy(tiny, bare_generator, greedy_batch, page_size):
    generator, pieces = bare_generator(tiny.model, page_size=page_size), 0
    images, questions, expected = greedy_batch
    one = SentenceBeamConfig(candidates=1, keep=1, temperature=0.0, max_new_tokens=120)
    for got, whole in zip(generator.answer_batch(images, questions, one), expected):
        assert got.tokens == whole.tokens
        nodes = got.trace.data["nodes"]
        assert sum(len(node["tokens"]) for node in nodes) < got.usage.generated_tokens, "nothing was taken back"
        assert [p for node in nodes for p in node["logprobs"]] == pytest.approx(
            whole.trace.data["nodes"][0]["logprobs"], abs=1e-4
        )
        pieces += len(nodes)
    assert pieces > 7 * len(questions)
    assert_nothing_held(generator.engine)


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_drawn_sentences_are_as_if_recomputed(subject, tiny, page_size):
    """A tree of pieces that were cut back, each page shared: every log-prob is what transformers says of its path."""
    trims = frozenset(range(4, len(tiny.engine.tags.tags)))

    def program(root):
        layer, seed, everything = [root], itertools.count(), []
        for _ in range(4):
            kids = yield [
                Expand(parent.id, (next(seed), next(seed)), SamplingParams(1.0), 25, NO_TAG, trims) for parent in layer
            ]
            layer = [kid for siblings in kids for kid in siblings if kid.finish is not Finish.EOS][:3]
            everything += [kid for siblings in kids for kid in siblings]
        return everything

    job, engine = subject.job(program), subject.engine(page_size)
    run(engine, [job])
    for branch in job.result:
        assert len(branch.tokens) == len(branch.logprobs) == len(branch.entropies) == len(branch.sampling_logprobs) > 0
        assert branch.length == job.prompt_length + len(branch.path())
        subject.assert_right(branch)
        if branch.finish is Finish.TAG and subject.model is tiny.model:
            text = tiny.processor.tokenizer.decode(branch.tokens)
            assert text.rstrip()[-1] in ".?!", text
    assert_nothing_held(engine)


# --- cancel ---


@pytest.mark.parametrize("num_pages", [None, 40], ids=["roomy", "crowded"])
def test_a_cancelled_job_frees_all_and_the_others_do_not_notice(subject, num_pages, is_full):
    def tree(root):
        (first,) = yield [Expand(root.id, (1, 2, 3), WILD, 8, NO_TAG)]
        (second,), third = yield [Extend(first[0].id, (7, 8)), Expand(first[1].id, (4, 5), WILD, 8, NO_TAG)]
        (fourth,) = yield [Expand(second.id, (6,), WILD, 8, NO_TAG)]
        return [branch.tokens for branch in (*first, *third, *fourth)]

    engine = subject.engine(4, num_pages)
    alone = [subject.job(tree, prompt) for prompt in range(4)]
    for job in alone:
        run(engine, [job])
    for at in range(0, 24, 3) if is_full else (0, 6, 9, 15, 21):
        jobs = [subject.job(tree, prompt) for prompt in range(4)]
        victims = {at % 4, (at // 4) % 4}
        for step, _ in enumerate(steps(engine, jobs)):
            if step == at:
                ended = [job.result is not None for job in jobs]
                for victim in victims:
                    jobs[victim].cancel()
                    jobs[victim].cancel()
            if step == at + 1:
                for victim in victims:
                    inner = jobs[victim].inner
                    assert (inner.branches, inner.slots, inner.pending) == ([], [], [])
        for index, job in enumerate(jobs):
            assert job.error is None
            if index in victims and not ended[index]:
                assert job.result is None
            else:
                assert job.result == alone[index].result
        assert_nothing_held(engine)


def test_cancelled_before_it_began(subject):
    engine, jobs = subject.engine(), [subject.job(growing(1, 5)), subject.job(growing(1, 5), 1)]
    jobs[0].cancel()
    run(engine, jobs)
    assert jobs[0].result is None and jobs[0].drive is None and len(jobs[1].result.tokens) == 5
    assert_nothing_held(engine)


# --- isolation ---


def fails_at_once(root):
    raise RuntimeError("at once")
    yield


def fails_later(root):
    yield [Expand(root.id, (1, 2), WILD, 5, NO_TAG)]
    raise RuntimeError("later")


def wants_unknown_tokens(root):
    yield [Extend(root.id, want=(5, -1))]


def asks_for_a_stranger(root):
    yield [Expand(7, (1,), WILD, 5, NO_TAG)]


def releases_the_prompt(root):
    yield [Release((root.id,))]


def asks_for_nonsense(root):
    yield [Expand(root.id, (1,), WILD, 5, NO_TAG), "sing"]


def asks_for_no_list(root):
    yield Expand(root.id, (1,), WILD, 5, NO_TAG)


def gives_unknown_tokens(root):
    yield [Extend(root.id, (5, 10**6))]


def grows_a_dropped_branch(root):
    ((branch,),) = yield [Expand(root.id, (1,), WILD, 5, NO_TAG)]
    yield [Extend(branch.id, top=2)]
    yield [Extend(branch.id, (5,), top=2), Release((branch.id,))]
    yield [Expand(branch.id, (1,), WILD, 5, NO_TAG)]


def cleans_up_badly(root):
    try:
        yield [Call(lambda items: 1 / 0, [1]), Expand(root.id, (1, 2), WILD, 5, NO_TAG)]
    finally:
        raise RuntimeError("while cleaning up")


BAD_PROGRAMS = {
    fails_at_once: "at once",
    fails_later: "later",
    wants_unknown_tokens: r"want must be in \[0, vocab_size=\d+\), got -1",
    asks_for_a_stranger: "parent must name a continuation of this session that has not been released, got 7",
    releases_the_prompt: "ids must not name the prompt",
    asks_for_nonsense: "a program must yield requests, got 'sing'",
    asks_for_no_list: "what a program yields must be a list of requests, got Expand",
    gives_unknown_tokens: r"tokens must be in \[0, vocab_size=\d+\), got 1000000",
    grows_a_dropped_branch: "parent must name a continuation of this session that has not been released, got 1",
    cleans_up_badly: "while cleaning up",
}


@pytest.mark.parametrize("bad, message", BAD_PROGRAMS.items(), ids=[bad.__name__ for bad in BAD_PROGRAMS])
@pytest.mark.parametrize("place", [0, 2])
def test_a_program_that_fails_fails_alone(subject, bad, message, place):
    engine = subject.engine()
    jobs = [subject.job(growing(1, 9), prompt) for prompt in range(3)]
    failing = subject.job(bad, 3)
    run(engine, [*jobs[:place], failing, *jobs[place:]])
    assert failing.result is None
    with pytest.raises((RuntimeError, TypeError, ValueError), match=message):
        raise failing.error
    for prompt, job in enumerate(jobs):
        assert job.error is None and job.result.tokens == subject.drawn_alone(prompt)
    assert_nothing_held(engine)


def test_a_program_that_cleans_up_badly_when_cancelled(subject):
    def program(root):
        try:
            yield [Expand(root.id, (1, 2), WILD, 50, NO_TAG)]
        finally:
            raise RuntimeError("while cleaning up")

    engine, jobs = subject.engine(), [subject.job(program), subject.job(growing(1, 9), 1)]
    for step, _ in enumerate(steps(engine, jobs)):
        if step == 3:
            jobs[0].cancel()
    assert jobs[0].result is None and len(jobs[1].result.tokens) == 9
    assert_nothing_held(engine)


def test_one_bad_question_of_a_batch(tiny):
    """Its error stands where its answer would, or is raised once the others have ended."""
    samples = [shapes.sample(seed) for seed in range(804_040, 804_044)]
    images, questions = [s.image for s in samples], [s.question for s in samples]
    finished = []

    def scorer(spans):
        if spans[0].question == questions[2]:
            raise RuntimeError("no score today")
        finished.append(spans[0].question)
        return confidence(spans)

    search = BestOfNConfig(n=2, scorer=scorer, max_new_tokens=60)
    answers = tiny.answer_batch(images, questions, search, return_exceptions=True)
    assert isinstance(answers[2], RuntimeError) and "no score today" in str(answers[2])
    for index in (0, 1, 3):
        assert answers[index].tokens == tiny.answer(images[index], questions[index], search).tokens
    finished.clear()
    with pytest.raises(RuntimeError, match="no score today"):
        tiny.answer_batch(images, questions, search)
    assert len(finished) == 3
    assert_nothing_held(tiny.engine)
