"""No budget is exceeded by more than one step, and a search that has spent it returns the best it has."""

import pytest

from llava_cot import SwiresConfig
from llava_cot.core import Call, SamplingParams, Usage
from llava_cot.data import shapes
from llava_cot.scoring import JudgeScorer, confidence, look_ahead
from llava_cot.search import POLICIES
from llava_cot.search.budget import Budget

SAMPLE = shapes.sample(802_001)
WIDTH = {  # the most candidates that grow in one step: what a step may draw
    "greedy": 1, "sample": 1, "best_of_n": 4, "majority": 8, "sentence_beam": 4, "stage_beam": 4, "swires": 4,
    "token_beam": 4,
}  # fmt: skip


def ask(generator, search, budget, **settings):
    answer = generator.answer(SAMPLE.image, SAMPLE.question, search, max_new_tokens=160, budget=budget, **settings)
    assert generator.engine.pages_in_use == 0
    return answer


def kinds(answer):
    return [event["event"] for event in answer.trace.data["events"]]


def ask_all(generator, search, budgets):
    """The answer with each budget, None included; their searches run beside each other."""
    plans = [generator.plan(search, max_new_tokens=160, budget=budget) for budget in budgets]
    runs = [generator.submit(SAMPLE.image, SAMPLE.question, plan) for plan in plans]
    generator.wait(runs)
    answers = [generator.answer_of(run) for run in runs]
    assert generator.engine.pages_in_use == 0
    return answers


@pytest.mark.parametrize("search", POLICIES)
def test_generated_tokens(tiny, search):
    limits = [1, 7, 40, 90, 150, 400]
    free, *answers = ask_all(tiny, search, [None, *(Budget(generated_tokens=limit) for limit in limits)])
    for limit, answer in zip(limits, answers, strict=True):
        # A step draws a token for each candidate; what it passes the limit by is in the reserve or in WIDTH.
        assert answer.usage.generated_tokens <= limit + WIDTH[search], limit
        if free.usage.generated_tokens < 0.75 * limit:
            assert answer.tokens == free.tokens and "budget_spent" not in kinds(answer), limit
        assert kinds(answer)[-1] == "accepted", limit
        if limit == 400:
            assert answer.conclusion  # a quarter of it is enough to finish on
        if search not in ("token_beam", "sentence_beam"):  # whose answers share tokens, and which takes tokens back
            nodes = answer.trace.data["nodes"]
            assert sum(len(node["tokens"]) for node in nodes) == answer.usage.generated_tokens, limit


def test_a_spent_search_finishes_greedily_from_its_best_prefix(tiny):
    answer = ask(tiny, SwiresConfig.published(cutoff=9.0), Budget(generated_tokens=320))
    *_, prefix, last = [node for node in answer.trace.data["nodes"] if node["kept"]]
    assert last["stage"] is None and last["parent"] == prefix["id"] and prefix["closed"]
    (spent,) = answer.trace.events("budget_spent")
    assert spent["what"] == "generated_tokens" and spent["spent"] >= 240
    assert answer.text.endswith(prefix["text"] + last["text"])
    assert answer.stages["CONCLUSION"].outcome == "complete"


def test_the_best_whole_answer_is_returned_if_there_is_one(tiny):
    def policy(search):
        nodes = yield from search.expand([search.root], 3, None, params=SamplingParams(temperature=0.6))
        yield from search.score(nodes, confidence)
        while True:
            yield from search.expand([search.root], 8, None, params=SamplingParams(temperature=1.0), round=2)

    answer = tiny.answer(SAMPLE.image, SAMPLE.question, policy, budget=Budget(generated_tokens=600), max_new_tokens=160)
    nodes = answer.trace.data["nodes"]
    assert answer.trace.data["answer"] == max(nodes[:3], key=lambda node: node["score"])["id"]
    assert len(nodes) > 3


@pytest.mark.parametrize("search", ["best_of_n", "swires", "stage_beam", "sentence_beam"])
def test_generations_and_scorer_calls(tiny, search):
    limits = [1, 3, 6]
    for limit, answer in zip(limits, ask_all(tiny, search, [Budget(generations=limit) for limit in limits])):
        assert answer.usage.generations <= limit + WIDTH[search] and answer.text, limit
        assert "budget_spent" in kinds(answer) or answer.usage.generations <= limit, limit
    for limit, answer in zip(limits, ask_all(tiny, search, [Budget(scorer_calls=limit) for limit in limits])):
        assert answer.usage.scorer_calls <= limit and answer.conclusion, limit


def test_what_a_scorer_draws_and_reads_counts_too(tiny):
    config = SwiresConfig.published(scorer=look_ahead, cutoff=9.0)
    assert ask(tiny, config, Budget(generated_tokens=300)).usage.generated_tokens <= 304
    judged = SwiresConfig.published(scorer=JudgeScorer(tiny.processor), cutoff=9.0)
    free = ask(tiny, judged, None).usage
    answer = ask(tiny, judged, Budget(prompt_tokens=free.prompt_tokens // 2))
    reads = max(4 * 40, 1)  # one judgement of four candidates
    assert answer.usage.prompt_tokens <= free.prompt_tokens // 2 + reads
    assert answer.trace.events("budget_spent")[0]["what"] == "prompt_tokens"


def test_the_last_candidates_are_scored_by_the_host_all_the_same(tiny):
    asked = []

    def by_call(spans):
        def function(items):
            asked.extend(items)
            return confidence(items)

        return (yield [Call(function, spans)])[0]

    free = ask(tiny, "best_of_n", None)
    spent = Budget(generated_tokens=free.usage.generated_tokens, reserve=0.0)
    answer = ask(tiny, "best_of_n", spent, scorer=by_call)
    assert answer.tokens == free.tokens and len(asked) > 1


def test_one_image_is_never_too_many(tiny):
    answer = ask(tiny, "best_of_n", Budget(image_encodings=1))
    assert answer.usage.image_encodings == 1 and answer.conclusion  # spent at once, and finished greedily


def test_seconds(tiny):
    answer = ask(tiny, SwiresConfig(cutoff=9.0, max_rounds=1000, candidates=16), Budget(seconds=0.6))
    assert len(answer.trace.events("retraced")) < 900, "without a budget it goes on to its last round"
    assert answer.trace.events("budget_spent")[0]["what"] == "seconds"


def test_a_budget_is_per_search_and_the_same_alone_or_together(tiny):
    samples = [shapes.sample(seed) for seed in range(802_000, 802_006)]
    config, budget = SwiresConfig.published(cutoff=-0.01), Budget(generated_tokens=300)
    settings = {"budget": budget, "max_new_tokens": 160}
    together = tiny.answer_batch([s.image for s in samples], [s.question for s in samples], config, **settings)
    for sample, answer in zip(samples, together):
        assert answer.tokens == tiny.answer(sample.image, sample.question, config, **settings).tokens
        assert answer.usage.generated_tokens <= 304


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"generated_tokens": 0}, r"budget.generated_tokens must be > 0, got 0"),
        ({"seconds": -1.0}, r"budget.seconds must be > 0, got -1.0"),
        ({"reserve": 1.0}, r"budget.reserve must be in \[0, 1\), got 1.0"),
    ],
)
def test_what_no_budget_may_say(settings, message):
    with pytest.raises(ValueError, match=message):
        Budget(**settings)


def test_the_reserve_is_of_tokens_and_seconds_alone():
    budget = Budget(generated_tokens=100, generations=4, reserve=0.25)
    assert budget.spent(Usage(generated_tokens=74)) is None
    assert budget.spent(Usage(generated_tokens=75)) == "generated_tokens"
    assert budget.limit(finishing=True).reached(Usage(generated_tokens=99, generations=9)) is None
    assert budget.limit(finishing=True).reached(Usage(generated_tokens=100)) == "generated_tokens"
    assert budget.spent(Usage(generations=3)) is None and budget.spent(Usage(generations=4)) == "generations"
