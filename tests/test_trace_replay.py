"""Replaying a trace: what a search stored is found again, and what was changed is reported at its place."""

import copy
import json
import math
import sys

import pytest
import torch

from llava_cot import EngineConfig, SwiresConfig, SwiresGenerator, cli
from llava_cot.data import shapes
from llava_cot.grammars import GRAMMARS
from llava_cot.replay import replay
from llava_cot.scoring import JudgeScorer
from llava_cot.search import POLICIES
from llava_cot.search.budget import Budget
from llava_cot.trace import Trace, parse_trace

SAMPLE = shapes.sample(809_000)
GRAMMAR = GRAMMARS["llamav-o1"]
SEARCHES = {
    **{name: {"search": name} for name in POLICIES},
    "retraced": {"search": SwiresConfig.published(cutoff=0.0)},
    "cut": {"search": SwiresConfig.published(cutoff=0.0), "budget": Budget(generated_tokens=60)},
}


@pytest.fixture(scope="module")
def generators(tiny):
    return {"tiny": tiny, "tiny-qwen": SwiresGenerator.from_pretrained("tiny-qwen")}


@pytest.fixture(scope="module")
def trace(tiny):
    """Of a search with retraces, at a temperature and with filters that log-probs must not show."""
    search = SwiresConfig.published(cutoff=0.0, temperature=0.5, top_p=0.8, max_new_tokens=120)
    found = tiny.answer(SAMPLE.image, SAMPLE.question, search, seed=2).trace
    assert found.events("retraced")
    return found


@pytest.fixture
def changed(trace):
    """A copy of the trace whose data may be changed, as it comes from a file."""

    def make(change):
        data = json.loads(trace.to_json())
        change(data)
        return parse_trace(data)

    return make


@pytest.fixture
def run(monkeypatch, capsys):
    """The command ``replay`` in this process; returns its exit status, stdout and stderr."""

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["llava-cot", "replay", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, *capsys.readouterr()

    return command


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "shapes.png"
    SAMPLE.image.save(path)
    return path


def assert_agrees(generator, trace: Trace, image) -> None:
    found = replay(generator, trace, image)
    drawn = [node for node in trace.data["nodes"] if node["tokens"]]
    assert found.agrees and found.skipped == found.differing == 0, found.differences
    assert (found.candidates, found.tokens) == (len(drawn), sum(len(node["tokens"]) for node in drawn))
    assert found.largest.size <= 1e-4
    engine = generator.engine
    assert (engine.pages_in_use, engine.pool.num_sequences, engine.images_in_use) == (0, 0, 0)


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("model", ["tiny", "tiny-qwen"])
def test_every_search_agrees(generators, model, search):
    generator = generators[model]
    answer = generator.answer(SAMPLE.image, SAMPLE.question, **SEARCHES[search], max_new_tokens=70, seed=1)
    assert_agrees(generator, parse_trace(answer.trace.to_json()), SAMPLE.image)


def test_a_judge_adds_nothing_to_the_path(tiny):
    answer = tiny.answer(SAMPLE.image, SAMPLE.question, "swires", scorer=JudgeScorer(tiny.processor), cutoff=0.9)
    assert_agrees(tiny, answer.trace, SAMPLE.image)


def test_turns_of_the_user_are_read_and_not_compared(tiny):
    generator = SwiresGenerator(tiny.model, tiny.processor, grammar=GRAMMAR)
    search = SwiresConfig(
        candidates=2, cutoff=0.0, grammar=GRAMMAR, max_stage_tokens={"summary": 12, "caption": 9}, max_new_tokens=60
    )
    answer = generator.answer(SAMPLE.image, SAMPLE.question, search)
    assert any(node["given"] for node in answer.trace.data["nodes"])
    assert_agrees(generator, answer.trace, SAMPLE.image)


@pytest.mark.parametrize("image", [None, [SAMPLE.image, shapes.sample(809_001).image]], ids=["none", "two"])
def test_no_image_and_two(tiny, image):
    answer = tiny.answer(image, SAMPLE.question, "best_of_n", n=2, max_new_tokens=40)
    assert_agrees(tiny, answer.trace, image)


def test_a_long_candidate_is_read_in_pieces(tiny, monkeypatch, trace):
    assert max(len(node["tokens"]) for node in trace.data["nodes"]) > 2 * 7 + 1
    monkeypatch.setattr("llava_cot.replay.TOKENS_PER_PASS", 7)
    assert_agrees(tiny, trace, SAMPLE.image)


def test_a_conversation_is_given_again(tiny, trace):
    turns = [
        {"role": "user", "content": SAMPLE.question},
        {"role": "assistant", "content": "Two."},
        {"role": "user", "content": "Are you sure?"},
    ]
    answer = tiny.answer(SAMPLE.image, turns, "greedy", max_new_tokens=20)
    assert replay(tiny, answer.trace, SAMPLE.image, turns).agrees
    with pytest.raises(
        ValueError, match=r"the prompt must have trace\.prompt_tokens=\d+ tokens, got \d+: model, images"
    ):
        replay(tiny, answer.trace, SAMPLE.image)


def test_a_failed_search_is_replayed_as_far_as_it_came(tiny):
    def failing(spans):
        raise RuntimeError("no score")

    with pytest.raises(RuntimeError) as raised:
        tiny.answer(SAMPLE.image, SAMPLE.question, "best_of_n", n=3, scorer=failing, max_new_tokens=30)
    assert raised.value.trace.failure
    assert_agrees(tiny, parse_trace(raised.value.trace.to_json()), SAMPLE.image)


def test_a_changed_logprob_is_reported_at_its_place(tiny, trace, changed):
    place, index = 5, 3

    def change(data):
        data["nodes"][place]["logprobs"][index] -= 2e-4

    found = replay(tiny, changed(change), SAMPLE.image)
    node = trace.data["nodes"][place]
    (difference,) = found.differences
    assert not found.agrees and found.differing == 1 and found.largest == difference
    assert (difference.candidate, difference.stage, difference.round) == (node["id"], node["stage"], node["round"])
    assert (difference.index, difference.token) == (index, node["tokens"][index])
    assert difference.text == tiny.processor.tokenizer.decode([difference.token])
    assert difference.found == pytest.approx(node["logprobs"][index], abs=1e-4)
    assert difference.stored == node["logprobs"][index] - 2e-4
    assert replay(tiny, changed(change), SAMPLE.image, tolerance=1e-3).agrees


def test_a_changed_token_is_reported_before_all_that_follows_it(tiny, trace, changed):
    place = next(i for i, node in enumerate(trace.data["nodes"]) if node["kept"] and len(node["tokens"]) > 6)
    node = trace.data["nodes"][place]

    def change(data):
        data["nodes"][place]["tokens"][4] = node["tokens"][4] + 1

    found = replay(tiny, changed(change), SAMPLE.image)
    first = found.differences[0]
    assert (first.candidate, first.index, first.token) == (node["id"], 4, node["tokens"][4] + 1)
    below = {node["id"]}
    for other in trace.data["nodes"]:
        below |= {other["id"]} if other["parent"] in below else set()
    assert {difference.candidate for difference in found.differences} <= below


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_logprob_that_is_no_number_differs(tiny, trace, value):
    data = copy.deepcopy(trace.data)
    data["nodes"][1]["logprobs"][2] = value
    found = replay(tiny, Trace(data), SAMPLE.image)
    assert [(each.candidate, each.index) for each in found.differences] == [(data["nodes"][1]["id"], 2)]
    assert found.largest.size == math.inf


def test_a_changed_model_is_reported(tiny, trace, bare_generator):
    model = copy.deepcopy(tiny.model)
    with torch.no_grad():
        model.lm_head.weight *= 1.01
    found = replay(bare_generator(model, page_size=4), trace, SAMPLE.image)
    assert not found.agrees and found.differences[0].size > 1e-4
    assert found.differences[0].candidate == trace.data["nodes"][0]["id"]


def test_candidates_without_tokens_or_logprobs_are_skipped(tiny, trace, changed):
    """What a remote server drew has none; what was drawn from it has no known path."""
    nodes = trace.data["nodes"]
    without = next(node["id"] for node in nodes if node["kept"] and node["parent"])
    below = [node["id"] for node in nodes if node["parent"] == without]
    silent = next(node["id"] for node in nodes if node["id"] not in (without, *below) and node["parent"])

    def change(data):
        for node in data["nodes"]:
            if node["id"] == without:
                node["tokens"] = node["logprobs"] = []
            elif node["id"] == silent:
                node["logprobs"] = []

    found = replay(tiny, changed(change), SAMPLE.image)
    dropped = {without, silent, *below}
    assert below and found.agrees
    assert found.candidates >= len(nodes) - len(dropped) - sum(node["parent"] in below for node in nodes)
    assert found.skipped == len(nodes) - found.candidates >= len(dropped)


def _set(name, value):
    return lambda data: data.update({name: value})


def _of_node(name, value):
    return lambda data: data["nodes"][1].update({name: value})


def _without_nodes(data):
    data.update(nodes=[], events=[], answer=None, answers=[], error={"type": "ValueError", "message": "no luck"})


def _much_too_long(data):
    data["nodes"][1].update(tokens=[5] * 100_000, logprobs=[0.0] * 100_000)


@pytest.mark.parametrize(
    "change, message",
    [
        (_of_node("tokens", [5, 10**9]), r"trace\.nodes\[1\]\.logprobs must be empty or have one for each of 2 tokens"),
        (
            _of_node("given", [10**9]),
            r"given of candidate #2 must be in \[0, vocab_size=\d+\), got 1000000000: is this",
        ),
        (_of_node("given", [-1]), r"given of candidate #2 must be in \[0, vocab_size=\d+\), got -1"),
        (_without_nodes, r"must have candidates with tokens and log-probs, got none among 0, and its search failed: "),
        (_set("question", None), "question must be given, since the trace holds none"),
        (_set("question", "Another?" * 9), r"prompt must have trace\.prompt_tokens=\d+ tokens, got \d+"),
        (_set("bos", "released"), "bos must be that of the trace, 'released', got 'one'"),
        (_much_too_long, r"trace must fit into max_position_embeddings=\d+, got a path of \d+ tokens"),
    ],
)
def test_a_hostile_trace_gives_one_clear_error(tiny, changed, change, message):
    with pytest.raises(ValueError, match=message):
        replay(tiny, changed(change), SAMPLE.image)
    assert tiny.engine.pages_in_use == 0


def test_an_image_must_be_given_where_there_was_one_and_only_there(tiny, trace):
    with pytest.raises(ValueError, match="image must be given, since the question was about one"):
        replay(tiny, trace)
    plain = tiny.answer(None, SAMPLE.question, "greedy", max_new_tokens=5).trace
    with pytest.raises(ValueError, match="image must not be given, since the question of the trace was about none"):
        replay(tiny, plain, SAMPLE.image)


def test_logits_processors_are_refused(tiny, trace, bare_generator):
    """What they change is in the log-probs of a trace, and not in those of tokens that are read."""
    model = copy.deepcopy(tiny.model)
    model.generation_config.repetition_penalty = 1.3
    with pytest.raises(ValueError, match="generation_config must have no logits processors"):
        replay(bare_generator(model), trace, SAMPLE.image)


def test_it_fits_where_one_path_fits(tiny, trace):
    """Other candidates are evicted, and computed again where they are continued."""
    paths = [trace.path(node["id"]) for node in trace.data["nodes"]]
    longest = trace.data["prompt_tokens"] + max(sum(len(node["tokens"]) for node in path) for path in paths)
    config = EngineConfig(page_size=4, num_pages=longest // 4 + 8)
    assert_agrees(SwiresGenerator(tiny.model, tiny.processor, engine=config), trace, SAMPLE.image)


def test_the_command(run, tmp_path, trace, changed, image):
    file = tmp_path / "trace.json"
    file.write_text(trace.to_json())
    code, out, _ = run(file, "--image", image)
    nodes = trace.data["nodes"]
    tokens = sum(len(node["tokens"]) for node in nodes)
    assert code == 0
    assert out.startswith(f"{tokens} tokens of {len(nodes)} candidates agree to 0.0001 (largest difference ")

    def change(data):
        data["nodes"][2]["logprobs"][1] = -9.0
        data["nodes"][0]["logprobs"] = []

    other = changed(change)
    file.write_text(json.dumps({"trace": other.data, "image": str(image)}))  # as in a line of a .jsonl
    code, out, _ = run(file)
    token, skipped, summary = out.splitlines()
    node = nodes[2]
    assert code == 1
    assert token.startswith(f"candidate #{node['id']} ({node['stage']}, round {node['round']}), token 1 ")
    assert f"(id {node['tokens'][1]}): the trace has log-prob -9, the model gives " in token
    assert skipped == "candidates that were skipped, since their tokens or log-probs are not known: 1"
    assert summary.startswith(f"1 of {tokens - len(nodes[0]['tokens'])} tokens, in 1 of {len(nodes) - 1} candidates, ")
    assert run(file, "--tolerance", "100")[0] == 0
    assert run(file, "--model", "tiny-qwen")[0] == 2  # its prompt has another length


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "trace.json: not JSON"),
        ("{}", "trace.version must be"),
        (None, "image must be given"),
        ("model", "model must be given, since the trace names none"),
    ],
)
def test_the_command_fails_on_one_line_before_the_weights_are_loaded(
    monkeypatch, run, tmp_path, trace, image, content, message
):
    monkeypatch.setattr(SwiresGenerator, "from_pretrained", None)
    file = tmp_path / "trace.json"
    data = {**trace.data, "model": ""}
    file.write_text(json.dumps(data) if content in (None, "model") else content)
    code, out, error = run(file, *(["--image", image] if content == "model" else []))
    assert (code, out) == (2, "") and message in error and len(error.splitlines()) == 1
    assert run(file, "--tolerance", "-1")[0] == 2
    assert run(tmp_path / "missing.json")[0] == 2
