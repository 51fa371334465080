"""The responses and the decisions API of a real server, through the client that people use."""

import openai
import pytest
from helpers.serving import data_uri, world

SAMPLE = world(11)


def asked(text):
    image = {"type": "input_image", "image_url": data_uri(SAMPLE.image), "detail": "auto"}
    return [{"role": "user", "content": [image, {"type": "input_text", "text": text}]}]


@pytest.mark.parametrize("search", ["greedy", "stage_beam"])
def test_responses_equal_answer(server, tiny, search):
    answer = tiny.answer(SAMPLE.image, SAMPLE.question, search, seed=3, max_new_tokens=256)
    ask = {"model": f"tiny:{search}", "input": asked(SAMPLE.question), "max_output_tokens": 256}
    client, seeded = server.client(), {"extra_body": {"seed": 3}}
    reply = client.responses.create(**ask, **seeded)
    assert (reply.output_text, reply.status) == (answer.conclusion, "completed")
    assert [item.type for item in reply.output] == ["reasoning", "message"]
    assert reply.usage.output_tokens == answer.usage.generated_tokens
    assert reply.llava_cot["search"]["name"] == search
    with client.responses.stream(**ask, **seeded) as stream:
        kinds = [event.type for event in stream]
        finished = stream.get_final_response()
    assert finished.output_text == answer.conclusion
    assert kinds[0] == "response.created" and kinds[-1] == "response.completed"
    assert kinds.index("response.reasoning_text.delta") < kinds.index("response.output_text.delta")
    server.assert_nothing_held()


@pytest.mark.parametrize("as_item", [lambda item: item, lambda item: item.model_dump()], ids=["object", "dump"])
def test_a_reply_is_part_of_the_next_input(server, as_item):
    client, ask = server.client(), {"model": "tiny:greedy", "max_output_tokens": 4}
    reply = client.responses.create(input=asked(SAMPLE.question), **ask)
    items = [*asked(SAMPLE.question), *map(as_item, reply.output), {"role": "user", "content": "Are you sure?"}]
    assert client.responses.create(input=items, **ask).usage.input_tokens > reply.usage.input_tokens


def test_decisions_have_a_probability_for_every_option(server):
    questions = [
        {"type": "predicate", "instructions": "There is a red circle.", "name": "red"},
        {
            "type": "choice",
            "instructions": "Which is it?",
            "choices": [{"value": "a"}, {"value": "b"}, {"value": True}],
        },
        {"type": "score", "instructions": "How full is it?", "levels": [{"label": "empty"}, {"label": "full"}]},
    ]
    reply = server.client().decisions.create(model="tiny", input=asked(SAMPLE.question), questions=questions)
    predicate, choice, score = reply.answers
    assert predicate.name == "red" and 0 <= predicate.probability <= 1
    assert sum(option.probability for option in choice.probabilities) == pytest.approx(1)
    assert choice.confidence == max(option.probability for option in choice.probabilities)
    assert [option.value for option in choice.probabilities] == ["a", "b", True]
    assert score.score == pytest.approx(score.probabilities[1].probability)
    assert all(0 < answer.label_mass <= 1 for answer in reply.answers)
    assert reply.usage.output_tokens == 0
    server.assert_nothing_held()


def test_a_decision_without_questions_is_refused(server):
    with pytest.raises(openai.BadRequestError, match="questions"):
        server.client().decisions.create(model="tiny", input="x", questions=[])
