"""Chat completions of a real server, through the client that people use."""

import json

import openai
import pytest
from helpers.serving import messages_of, world

from llava_cot.search import POLICIES
from llava_cot.search.plan import PRESETS

LIMITS = {"max_completion_tokens": 256}
SEARCHES = ("greedy", "sample", "best_of_n", "majority", "sentence_beam", "stage_beam", "token_beam", "swires")


def expected(generator, sample, search, seed, **settings):
    return generator.answer(sample.image, sample.question, search, seed=seed, max_new_tokens=256, **settings)


def streamed(chunks):
    """The texts, the finish reason, the usage, the events and the last extension object of a stream of one choice."""
    found = {"content": "", "reasoning": "", "events": [], "finish_reason": None, "usage": None, "last": None}
    for chunk in chunks:
        for choice in chunk.choices:
            found["content"] += choice.delta.content or ""
            reasoning = getattr(choice.delta, "reasoning", None) or ""
            assert reasoning == (getattr(choice.delta, "reasoning_content", None) or "")
            found["reasoning"] += reasoning
            found["finish_reason"] = choice.finish_reason or found["finish_reason"]
        found["usage"] = chunk.usage or found["usage"]
        extension = getattr(chunk, "llava_cot", None)
        if extension is not None:
            if "event" in extension:
                found["events"].append(extension["event"])
            else:
                found["last"] = extension
    return found


def test_models_are_searches(server):
    models = {model.id: model for model in server.client().models.list()}
    assert set(models) == {"tiny", *(f"tiny:{search}" for search in (*POLICIES, *PRESETS))}
    assert models["tiny"].owned_by == "llava-cot"
    assert models["tiny"].llava_cot["search"] == "swires"
    assert server.client().models.retrieve("tiny:stage_beam").llava_cot["search"] == "stage_beam"
    with pytest.raises(openai.NotFoundError, match="got 'tiny:none'"):
        server.client().models.retrieve("tiny:none")


@pytest.mark.parametrize("search", SEARCHES)
def test_replies_and_streams_equal_answer(server, tiny, search):
    sample, client = world(11), server.client()
    answer = expected(tiny, sample, search, 7)
    ask = {"model": f"tiny:{search}", "messages": messages_of(sample), "seed": 7, **LIMITS}
    reply = client.chat.completions.create(**ask, extra_body={"return_token_ids": True})
    (choice,) = reply.choices
    assert choice.message.content == answer.conclusion
    assert choice.token_ids == answer.tokens
    before = [stage.text for name, stage in answer.stages.items() if name != "CONCLUSION"]
    assert choice.message.reasoning == choice.message.reasoning_content == "\n\n".join(before)
    assert choice.finish_reason == "stop"
    stages = {name: stage["text"] for name, stage in reply.llava_cot["stages"].items()}
    assert stages == {name: stage.text for name, stage in answer.stages.items()}
    assert reply.llava_cot["search"]["name"] == search
    assert reply.llava_cot["search"]["retraces"] == len(answer.trace.events("retraced"))
    drawn = answer.usage.generated_tokens
    details = reply.usage.completion_tokens_details
    assert reply.usage.completion_tokens == drawn
    assert details.discarded_tokens == drawn - len(answer.tokens)
    assert details.discarded_tokens < details.reasoning_tokens < drawn
    assert reply.usage.prompt_tokens == answer.trace.data["prompt_tokens"]
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + drawn

    stream = client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True})
    found = streamed(stream)
    assert (found["content"], found["reasoning"]) == (choice.message.content, choice.message.reasoning)
    assert (found["finish_reason"], found["usage"]) == ("stop", reply.usage)
    assert found["last"]["stages"] == reply.llava_cot["stages"]
    kinds = {event["type"] for event in found["events"]}
    assert ("candidates" in kinds) == (search not in ("greedy", "sample"))
    server.assert_nothing_held()


def test_a_retraced_text_is_never_content(server):
    ask = {"model": "tiny", "messages": messages_of(world(3)), "seed": 5, **LIMITS}
    order = []
    for chunk in server.client().chat.completions.create(**ask, stream=True):
        extension = getattr(chunk, "llava_cot", None) or {}
        order += ["retrace"] if extension.get("event", {}).get("type") == "retrace" else []
        order += [
            name for choice in chunk.choices for name in ("content", "reasoning") if getattr(choice.delta, name, None)
        ]
    assert order == ["retrace", "retrace", "reasoning", "content"]


def test_several_answers_have_seeds_that_follow_each_other(server, tiny):
    sample, client = world(12), server.client()
    answers = [expected(tiny, sample, "sample", seed) for seed in (20, 21, 22)]
    ask = {"model": "tiny:sample", "messages": messages_of(sample), "seed": 20, "n": 3, **LIMITS}
    reply = client.chat.completions.create(**ask)
    assert [choice.message.content for choice in reply.choices] == [answer.conclusion for answer in answers]
    assert reply.usage.completion_tokens == sum(answer.usage.generated_tokens for answer in answers)
    assert [part["search"]["seed"] for part in reply.llava_cot["choices"]] == [20, 21, 22]
    contents = ["", "", ""]
    for chunk in client.chat.completions.create(**ask, stream=True):
        for choice in chunk.choices:
            contents[choice.index] += choice.delta.content or ""
    assert contents == [answer.conclusion for answer in answers]


def test_settings_sampling_and_scorer(server, tiny):
    sample = world(13)
    answer = expected(tiny, sample, "best_of_n", 3, n=2, temperature=0.9, top_p=0.8)
    reply = server.client().chat.completions.create(
        model="tiny",
        messages=messages_of(sample),
        seed=3,
        temperature=0.9,
        top_p=0.8,
        max_tokens=256,
        extra_body={
            "llava_cot": {"search": "best_of_n", "settings": {"n": 2}, "scorer": "confidence", "trace": "full"}
        },
    )
    assert reply.choices[0].message.content == answer.conclusion
    trace = reply.llava_cot["trace"]
    assert trace["model"] == "tiny"
    assert [node["tokens"] for node in trace["nodes"]] == [node["tokens"] for node in answer.trace.data["nodes"]]
    assert {name: trace["config"][name] for name in ("n", "temperature", "top_p", "scorer")} == {
        "n": 2,
        "temperature": 0.9,
        "top_p": 0.8,
        "scorer": "confidence",
    }


@pytest.mark.parametrize(
    ("effort", "search"), [("none", "greedy"), ("low", "stage_beam"), ("medium", "swires"), ("high", "swires")]
)
def test_reasoning_effort_chooses_the_search(server, effort, search):
    ask = {"model": "tiny", "messages": messages_of(world(4)), "seed": 1, "reasoning_effort": effort, **LIMITS}
    reply = server.client().chat.completions.create(**ask, extra_body={"llava_cot": {"trace": "full"}})
    assert reply.llava_cot["search"]["name"] == search
    if effort == "high":
        assert set(reply.llava_cot["trace"]["config"]["candidates"].values()) == {8}


def test_a_budget_ends_a_search_with_its_best_answer(server):
    reply = server.client().chat.completions.create(
        model="tiny",
        messages=messages_of(world(4)),
        seed=1,
        extra_body={"llava_cot": {"budget": {"generated_tokens": 200}}},
    )
    assert reply.llava_cot["search"]["budget_spent"] == ["generated_tokens"]
    assert reply.usage.completion_tokens <= 200 + 4


def test_stop_cuts_the_content(server, tiny):
    sample, client = world(6), server.client()
    content = expected(tiny, sample, "greedy", 0).conclusion
    ask = {"model": "tiny:greedy", "messages": messages_of(sample), "stop": [content[-1:]], **LIMITS}
    assert client.chat.completions.create(**ask).choices[0].message.content == content[:-1]
    assert streamed(client.chat.completions.create(**ask, stream=True))["content"] == content[:-1]


def test_logprobs_are_those_of_the_whole_answer(server, tiny):
    sample = world(6)
    answer = expected(tiny, sample, "greedy", 0)
    reply = server.client().chat.completions.create(
        model="tiny:greedy", messages=messages_of(sample), logprobs=True, **LIMITS
    )
    entries = reply.choices[0].logprobs.content
    assert b"".join(bytes(entry.bytes) for entry in entries).decode() == answer.text
    node = answer.trace.data["nodes"][0]
    assert [entry.logprob for entry in entries] == pytest.approx(node["logprobs"], abs=1e-4)


def test_an_answer_that_is_cut_says_so(server):
    ask = {"model": "tiny:greedy", "messages": messages_of(world(6)), "max_completion_tokens": 12}
    reply = server.client().chat.completions.create(**ask)
    assert (reply.choices[0].finish_reason, reply.choices[0].message.content) == ("length", "")
    found = streamed(server.client().chat.completions.create(**ask, stream=True))
    assert (found["finish_reason"], found["content"]) == ("length", "")
    assert found["reasoning"] == reply.choices[0].message.reasoning


def test_a_conversation_of_several_turns(server, tiny):
    sample = world(8)
    first = messages_of(sample)
    turns = [{"role": "system", "content": "Be brief."}, *first, {"role": "assistant", "content": "2"}]
    turns.append({"role": "user", "content": "Are you sure?"})
    reply = server.client().chat.completions.create(model="tiny:greedy", messages=turns, **LIMITS)
    asked = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": sample.question}]},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "Are you sure?"},
    ]
    answer = tiny.answer(sample.image, asked, "greedy", max_new_tokens=256)
    assert reply.choices[0].message.content == (answer.conclusion or answer.text.strip())


@pytest.mark.parametrize("as_turn", [lambda turn: turn, lambda turn: turn.model_dump()], ids=["object", "dump"])
def test_a_reply_is_a_turn_of_the_next_request(server, as_turn):
    client, ask = server.client(), {"model": "tiny:greedy", **LIMITS}
    first = messages_of(world(8))
    reply = client.chat.completions.create(messages=first, **ask)
    turns = [*first, as_turn(reply.choices[0].message), {"role": "user", "content": "Are you sure?"}]
    assert client.chat.completions.create(messages=turns, **ask).usage.prompt_tokens > reply.usage.prompt_tokens


def test_a_request_without_an_image_never_starts_a_search(server):
    """Front ends ask the model of a conversation for its title and its tags."""
    task = [{"role": "user", "content": "### Task:\nGenerate a concise, 3-5 word title for the chat history."}]
    client = server.client()
    for model in ("tiny", "tiny:swires", "tiny:best_of_n"):
        reply = client.chat.completions.create(model=model, messages=task, temperature=0.7, max_tokens=40)
        assert reply.llava_cot["search"]["name"] == "greedy"
        assert reply.llava_cot["search"]["candidates"] == 1
    named = {"llava_cot": {"search": "best_of_n"}}
    reply = client.chat.completions.create(model="tiny", messages=task, max_tokens=40, extra_body=named)
    assert reply.llava_cot["search"]["name"] == "best_of_n"


REFUSED = [
    ({"foo": 1}, "foo is not a field"),
    ({"tools": []}, "tools is not a field"),
    ({"llava_cot": {"foo": 1}}, "llava_cot.foo is not a field"),
    ({"llava_cot": {"search": "none"}}, "llava_cot.search must be one of"),
    ({"llava_cot": {"settings": {"foo": 1}}}, "foo is not supported by search='swires'"),
    ({"llava_cot": {"settings": {"candidates": 0}}}, "candidates"),
    ({"llava_cot": {"settings": {"budget": {}}}}, "must not have 'budget'"),
    ({"llava_cot": {"scorer": "none"}}, "llava_cot.scorer must be one of"),
    ({"llava_cot": {"budget": {"foo": 1}}}, "llava_cot.budget must have keys"),
    ({"llava_cot": {"budget": {"seconds": -1}}}, "llava_cot.budget.seconds must be > 0"),
    ({"llava_cot": {"budget": {"seconds": 1e9}}}, "llava_cot.budget.seconds must be at most"),
    ({"llava_cot": {"settings": {"candidates": 4096}}}, "from 1 to"),
    ({"llava_cot": {"seeds": [1]}}, "llava_cot.seeds must not be given without"),
    ({"n": 0}, "n must be from 1"),
    ({"n": 10**6}, "n must be from 1"),
    ({"seed": -1}, "seed must be in"),
    ({"seed": 2**63}, "seed must be in"),
    ({"temperature": -1, "llava_cot": {}}, "temperature must be >= 0"),
    ({"top_p": 0, "llava_cot": {}}, "top_p must be in"),
    ({"max_tokens": 0}, "max_tokens must be from 1"),
    ({"max_completion_tokens": 10**9}, "max_completion_tokens must be from 1"),
    ({"max_tokens": 5, "max_completion_tokens": 5}, "must not both be given"),
    ({"top_logprobs": 5}, "top_logprobs"),
    ({"reasoning_effort": "huge"}, "reasoning_effort"),
    ({"reasoning_effort": "low", "model": "tiny:greedy"}, "reasoning_effort must not be given"),
    ({"messages": []}, "messages must be from 1"),
    ({"messages": [{"role": "user", "content": ""}]}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "messages[0].content[0]"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "assistant", "content": "x"}]}, "must end with a message of the user"),
    ({"stop": ["a"] * 5}, "stop"),
]


@pytest.mark.parametrize(("fields", "words"), REFUSED, ids=[json.dumps(fields)[:60] for fields, _ in REFUSED])
def test_a_wrong_request_is_refused_by_the_name_of_its_field(server, fields, words):
    ask = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], **fields}
    named = {name: ask.pop(name) for name in ("model", "messages")}
    if "llava_cot" in ask and "search" not in ask["llava_cot"]:
        ask["llava_cot"] = {"search": "swires", **ask["llava_cot"]}
    with pytest.raises(openai.BadRequestError) as raised:
        server.client().chat.completions.create(**named, extra_body=ask)
    assert words in raised.value.message
    assert raised.value.body["type"] == "invalid_request_error"
    assert raised.value.body["param"]
