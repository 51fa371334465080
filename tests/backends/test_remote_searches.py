"""Searches on a real server of this project equal those on the local engine, and what fails ends in one clear error."""

import asyncio
import gc
import json
import subprocess
import sys
import threading
import time

import pytest
import uvicorn
from helpers.faulty_proxy import proxying

from llava_cot import Budget, Extend, SampleConfig, SwiresGenerator, connect
from llava_cot.backends.openai.loop import WORKER
from llava_cot.backends.openai.server import RemoteError
from llava_cot.cli import app as cli
from llava_cot.core import Feature
from llava_cot.data import shapes
from llava_cot.grammars import GRAMMARS
from llava_cot.scoring import JudgeScorer, confidence
from llava_cot.serve.app import create_app

DEADLINE = 300  # seconds; nothing takes so long unless it hangs
SAMPLE = shapes.sample(shapes.TEST_SEEDS[12])
SHORT = {"max_new_tokens": 128}


@pytest.fixture(scope="module")
def served():
    """The generator of a running server."""
    return SwiresGenerator.from_pretrained("tiny")


@pytest.fixture(scope="module")
def url(served):
    server = uvicorn.Server(uvicorn.Config(create_app(served, name="tiny"), port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until(lambda: server.started)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def remote(url, tiny):
    with connect(f"{url}/v1", calibrations=[*tiny.calibrations.values()]) as found:
        yield found


@pytest.fixture
def proxy(url):
    with proxying(url) as found:
        yield found


@pytest.fixture
def beyond(proxy):
    """A generator that is connected through the proxy."""
    with connect(f"{proxy.url}/v1", max_retries=1) as found:
        yield found


def until(is_true):
    end = time.monotonic() + DEADLINE
    while not is_true():
        assert time.monotonic() < end
        time.sleep(0.01)


def drawn(answer):
    names = ("parent", "stage", "seed", "text", "tokens", "finish", "closed", "kept", "round", "violation")
    return [tuple(node[name] for name in names) for node in answer.trace.data["nodes"]]


@pytest.mark.parametrize("search", ["greedy", "best_of_n", "majority", "stage_beam", "sentence_beam", "swires"])
def test_it_draws_what_the_local_engine_draws(tiny, remote, search):
    for seed in (0, 1):
        here = tiny.answer(SAMPLE.image, SAMPLE.question, search, seed=seed, **SHORT)
        there = remote.answer(SAMPLE.image, SAMPLE.question, search, seed=seed, **SHORT)
        assert drawn(there) == drawn(here)
        assert (there.text, there.tokens, there.conclusion) == (here.text, here.tokens, here.conclusion)
        for one, other in zip(there.trace.data["nodes"], here.trace.data["nodes"]):
            for name in ("logprobs", "sampling_logprobs", "entropies"):
                assert one[name] == pytest.approx(other[name], abs=1e-4)
        taken_back = ["generated_tokens"] if search == "sentence_beam" else []  # they count, but are not sent
        for name in {"prompt_tokens", "generated_tokens", "generations", "scorer_calls"} - {*taken_back}:
            assert getattr(there.usage, name) == getattr(here.usage, name)
        assert there.usage.seconds > 0


def test_several_at_once_streams_and_asyncio(tiny, remote):
    samples = [shapes.sample(seed) for seed in shapes.TEST_SEEDS[20:23]]
    images, questions = [sample.image for sample in samples], [sample.question for sample in samples]
    here = tiny.answer_batch(images, questions, "stage_beam", **SHORT)
    there = remote.answer_batch(images, questions, "stage_beam", **SHORT)
    again = asyncio.run(remote.aio.answer_batch(images, questions, "stage_beam", **SHORT))
    assert [*map(drawn, there)] == [*map(drawn, here)] == [*map(drawn, again)]
    events = [*remote.stream(images[0], questions[0], "stage_beam", **SHORT)]
    expected = [*tiny.stream(images[0], questions[0], "stage_beam", **SHORT)]
    assert [*map(type, events)] == [*map(type, expected)]
    assert events[-1].answer.text == here[0].text


def test_a_conversation_and_a_system_prompt(tiny, url):
    asked = [
        {"role": "user", "content": SAMPLE.question},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "Are you sure?"},
    ]
    here = SwiresGenerator(tiny.model, tiny.processor, system="Be brief.")
    with connect(f"{url}/v1", system="Be brief.") as there:
        found = [each.answer(SAMPLE.image, asked, "greedy", max_new_tokens=24) for each in (here, there)]
    assert drawn(found[0]) == drawn(found[1])


def test_budgets_hold(remote):
    found = remote.answer(SAMPLE.image, SAMPLE.question, "best_of_n", budget=Budget(generated_tokens=120))
    (spent,) = found.trace.events("budget_spent")
    assert spent["what"] == "generated_tokens" and found.usage.generated_tokens <= 120 + 4
    found = remote.answer(SAMPLE.image, SAMPLE.question, "swires", budget=Budget(seconds=0.05))
    assert [event["what"] for event in found.trace.events("budget_spent")] == ["seconds"]
    found = remote.answer(SAMPLE.image, SAMPLE.question, "swires", budget=Budget(generations=5), **SHORT)
    assert [event["what"] for event in found.trace.events("budget_spent")] == ["generations"]


def test_what_a_server_lacks_is_refused_by_name_before_anything_runs(tiny, remote, url):
    with pytest.raises(ValueError, match=r"search='token_beam' needs a back end with \['extend'\]"):
        remote.answer(SAMPLE.image, SAMPLE.question, "token_beam")
    with pytest.raises(ValueError, match=r"scorer='judge_yes_no' needs a back end with \['extend'\]"):
        remote.answer(SAMPLE.image, SAMPLE.question, "best_of_n", scorer=JudgeScorer(tiny.processor))
    with pytest.raises(ValueError, match=r"grammar must be that of the server's model"):
        connect(f"{url}/v1", grammar="think-answer")
    plan = remote.plan("best_of_n", scorer="negative_entropy")
    with pytest.raises(ValueError, match=r"scorer='negative_entropy' needs a back end with \['entropies'\]"):
        plan.check_features(remote.grammar, frozenset({Feature.LOGPROBS}))
    with pytest.raises(ValueError, match=r"turns of the user, \['summary', .*, needs a back end with \['extend'\]"):
        remote.plan("greedy").check_features(GRAMMARS["llamav-o1"], remote.features)

    def reader(search):
        yield [Extend(search.root.id, (5,))]

    with pytest.raises(ValueError, match=r"Extend needs a back end with \['extend'\]") as error:
        remote.answer(SAMPLE.image, SAMPLE.question, reader)
    assert error.value.trace.failure


def test_scorers_do_not_hold_up_other_searches(remote):
    """One waits in its scorer until another search has ended."""
    is_other_done, names = threading.Event(), []

    def patient(spans):
        names.append(threading.current_thread().name)
        assert is_other_done.wait(DEADLINE)
        return confidence(spans)

    run = remote.submit(SAMPLE.image, SAMPLE.question, remote.plan("best_of_n", scorer=patient, **SHORT))
    until(lambda: names)
    assert remote.answer(SAMPLE.image, SAMPLE.question, "greedy", **SHORT).text
    is_other_done.set()
    remote.wait([run])
    assert remote.answer_of(run).text and names[0].startswith(WORKER)


def error_body(message):
    return json.dumps({"error": {"message": message, "type": "x", "param": None, "code": None}}).encode()


@pytest.mark.parametrize(
    "fault, message",
    [
        ((401, error_body("no such key"), {}), "refuses the key, the model or the account: HTTP 401"),
        ((404, error_body("no such model"), {}), "refuses the key, the model or the account: HTTP 404"),
        ((400, error_body("too long"), {}), "HTTP 400"),
        ((500, error_body("broken"), {}), r"HTTP 500.*2 tries"),
        ((200, b'{"choices": [', {}), r"is not a chat completion: b'{\"choices\": \['.*2 tries"),
        ((200, b'{"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 1}}', {}), "2 tries"),
        ("drop", "no connection: .*2 tries"),
    ],
    ids=["401", "404", "400", "500", "half JSON", "no choice", "drop"],
)
def test_a_fault_ends_in_one_error_that_names_what_was_asked(proxy, beyond, monkeypatch, fault, message):
    monkeypatch.setattr("llava_cot.endpoint.FIRST_WAIT", 0.01)
    proxy.faults.extend([fault, fault])
    with pytest.raises(RemoteError, match=message) as error:
        beyond.answer(SAMPLE.image, SAMPLE.question, "stage_beam", **SHORT)
    assert f"{proxy.url}/v1 was asked to begin a reply by 4 x 128 tokens with model 'tiny'" in str(error.value)
    assert error.value.trace.failure and error.value.trace.data["search"] == "stage_beam"
    proxy.faults.clear()
    assert beyond.answer(SAMPLE.image, SAMPLE.question, "greedy", **SHORT).text


def test_a_busy_server_is_asked_again_when_it_says(proxy, beyond, monkeypatch):
    monkeypatch.setattr("llava_cot.endpoint.FIRST_WAIT", 0.01)
    proxy.faults.append((429, error_body("later"), {"retry-after": "0.2"}))
    began = time.monotonic()
    assert beyond.answer(SAMPLE.image, SAMPLE.question, "greedy", **SHORT).text
    assert time.monotonic() - began >= 0.2


def test_nothing_to_connect_to(url):
    with pytest.raises(RemoteError, match="was asked for its models, but no connection"):
        connect("http://127.0.0.1:9/v1", max_retries=0)
    with pytest.raises(RemoteError, match=r"was asked for its models, but .*HTTP 404"):
        connect(f"{url}/v2", max_retries=0)
    with pytest.raises(RemoteError, match=r"HTTP 404.*; most base URLs end with /v1"):
        connect(url, max_retries=0)
    with pytest.raises(ValueError, match=r"model must be one of those of .*'tiny:swires'.*, got 'huge'"):
        connect(f"{url}/v1", model="huge")
    with pytest.raises(ValueError, match="base_url must begin with http"):
        connect("localhost:8000")


def test_what_is_closed_or_dropped_leaves_nothing_behind(served, url):
    before = {*threading.enumerate()}
    there = connect(f"{url}/v1")
    events = there.stream(SAMPLE.image, SAMPLE.question, "swires", max_new_tokens=2048)
    next(events)
    events.close()
    until(lambda: not served.engine.has_work)
    run = there.submit(SAMPLE.image, SAMPLE.question, there.plan("sample", max_new_tokens=2048))
    until(lambda: served.engine.has_work)
    del run  # nobody holds it
    gc.collect()
    until(lambda: not served.engine.has_work and served.engine.pages_in_use == 0)
    run = there.submit(SAMPLE.image, SAMPLE.question, there.plan(SampleConfig(num_return_sequences=64)))
    until(lambda: served.engine.has_work)
    there.close()
    there.close()
    assert run.done and "the connection was closed" in str(there.error_of(run))
    own = [thread for thread in threading.enumerate() if thread.name.startswith(("llava-cot requests", WORKER))]
    assert not {*own} - before
    until(lambda: not served.engine.has_work and served.engine.pages_in_use == 0)
    with pytest.raises(ValueError, match="the connection must be open"):
        there.answer(SAMPLE.image, SAMPLE.question, "greedy")


WITHOUT_TORCH = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "llava_cot_kernels"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
from llava_cot import connect, SwiresConfig
from llava_cot.data import shapes
sample = shapes.sample(int(sys.argv[2]))
with connect(sys.argv[1]) as generator:
    answer = generator.answer(sample.image, sample.question, SwiresConfig(cutoff=-0.2), max_new_tokens=128)
    answer.trace.to_html()
    print(answer.conclusion)
"""


def test_it_needs_no_torch(tiny, url):
    command = [sys.executable, "-c", WITHOUT_TORCH, f"{url}/v1", str(shapes.TEST_SEEDS[12])]
    found = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE)
    assert found.returncode == 0, found.stderr
    here = tiny.answer(SAMPLE.image, SAMPLE.question, "swires", cutoff=-0.2, **SHORT)
    assert found.stdout.strip() == here.conclusion


def test_the_command(tiny, url, tmp_path):
    from typer.testing import CliRunner

    image, trace = tmp_path / "image.png", tmp_path / "trace.json"
    SAMPLE.image.save(image)
    command = ["answer", str(image), SAMPLE.question, "--server", f"{url}/v1", "--search", "stage_beam", "--json"]
    found = CliRunner().invoke(cli, [*command, "--max-new-tokens", "128", "--trace", str(trace)])
    assert found.exit_code == 0, found.output
    here = tiny.answer(SAMPLE.image, SAMPLE.question, "stage_beam", **SHORT)
    assert json.loads(found.stdout)["conclusion"] == here.conclusion
    assert json.loads(trace.read_text())["model"] == f"tiny at {url}/v1"
    found = CliRunner().invoke(cli, [*command, "--device", "cpu"])
    assert "device must not be given with server" in str(found.exception)
