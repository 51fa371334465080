"""Conversations, system prompts, variables of the chat template, and processors that don't fit."""

import json
from copy import deepcopy

import pytest
from helpers.random_llava import FAMILIES, build_random_llava
from tokenizers.normalizers import Lowercase

from llava_cot import SwiresGenerator
from llava_cot.data import shapes
from llava_cot.grammars import GRAMMARS
from llava_cot.prompt import build_inputs
from llava_cot.question import question_text
from llava_cot.stages import Grammar

SAMPLE = shapes.sample(801_234)
CHAT = [
    {"role": "user", "content": "What is here?"},
    {"role": "assistant", "content": [{"type": "text", "text": "Shapes."}]},
    {"role": "user", "content": [{"type": "text", "text": "How many?"}]},
]


def text_of(processor, image, question, **settings):
    return processor.tokenizer.decode(build_inputs(processor, image, question, "one", **settings)["input_ids"][0])


def test_a_conversation(tiny):
    text = text_of(tiny.processor, SAMPLE.image, CHAT, system="Be brief.")
    order = ["system", "Be brief.", "user", "<|image|>What is here?", "assistant", "Shapes.", "user", "How many?"]
    places = [text.find(part) for part in order[:4]]
    assert all(at >= 0 for at in places) and places == sorted(places)
    assert text.index("Shapes.") < text.index("How many?") and text.count("<|image|>") == 1
    assert text.endswith("<|start_header_id|>assistant<|end_header_id|>\n\n")
    assert question_text(CHAT) == "How many?" and question_text("Why?") == "Why?"
    alone = text_of(tiny.processor, SAMPLE.image, [{"role": "user", "content": "Why?"}])
    assert alone == text_of(tiny.processor, SAMPLE.image, "Why?")


def test_images_where_the_conversation_puts_them(tiny):
    chat = [CHAT[0], CHAT[1], {"role": "user", "content": [*CHAT[2]["content"], {"type": "image"}]}]
    assert "How many?<|image|>" in text_of(tiny.processor, SAMPLE.image, chat)
    with pytest.raises(ValueError, match="question must have a part of the type 'image' for each image=2, got 1"):
        build_inputs(tiny.processor, [SAMPLE.image] * 2, chat, "one")


def test_special_tokens_in_a_conversation_are_text(tiny):
    chat = [{"role": "user", "content": "<|eot_id|> <|image|>"}]
    ids = build_inputs(tiny.processor, SAMPLE.image, chat, "one", system="<|image|>")["input_ids"][0].tolist()
    assert ids.count(tiny.processor.image_token_id) == 1


def test_variables_of_the_template(tiny):
    processor = deepcopy(tiny.processor)
    processor.chat_template += "{% if enable_thinking %}<think>{% endif %}"
    assert not text_of(processor, None, "Why?").endswith("<think>")
    assert text_of(processor, None, "Why?", chat_template_kwargs={"enable_thinking": True}).endswith("<think>")
    generator = SwiresGenerator(tiny.model, processor, chat_template_kwargs={"enable_thinking": True}, system="Think.")
    answers = [each.answer(None, "Why?", "greedy", max_new_tokens=3) for each in (generator, tiny)]
    assert answers[0].trace.data["prompt_tokens"] > answers[1].trace.data["prompt_tokens"]


def test_a_conversation_is_answered(tiny):
    answer = tiny.answer(SAMPLE.image, CHAT, "greedy", max_new_tokens=4)
    assert answer.trace.data["question"] == "How many?"


@pytest.mark.parametrize(
    "chat, message",
    [
        ([], "question must end with a message of the user with a text, got"),
        (CHAT[:2], "question must end with a message of the user"),
        ([{"role": "user", "content": [{"type": "image"}]}], "question must end with a message of the user"),
        (["Why?"], r"question\[0\] must be a message with a role of"),
        ([{"role": "tool", "content": "x"}], r"question\[0\] must be a message with a role of"),
        ([CHAT[0], {"role": "system", "content": "x"}, CHAT[2]], r"question\[1\] must not be a system prompt"),
        (
            [{"role": "user", "content": [{"type": "video"}]}],
            r"question\[0\] must have parts of the type 'text' or 'im",
        ),
        (
            [{"role": "user", "content": None}],
            r"the content of question\[0\] must be a string or a list",
        ),
        ([{"role": "user", "content": " "}], r"the text of question\[0\] must be a non-empty string, got ' '"),
        ([{"role": "user", "content": "\ud800"}], r"the text of question\[0\] must be Unicode text"),
    ],
)
def test_what_is_no_conversation(tiny, chat, message):
    with pytest.raises(ValueError, match=message):
        tiny.answer(None, chat, "greedy")
    (error,) = tiny.answer_batch([None], [chat], "greedy", return_exceptions=True)
    assert isinstance(error, ValueError)


def test_two_system_prompts(tiny):
    chat = [{"role": "system", "content": "Be brief."}, CHAT[0]]
    assert "Be brief." in text_of(tiny.processor, None, chat)
    with pytest.raises(ValueError, match="system must be None for a conversation that begins with a system prompt"):
        build_inputs(tiny.processor, None, chat, "one", system="Be long.")


def test_a_processor_of_another_model(tiny):
    generator = SwiresGenerator(build_random_llava(vocab=700, image_token=650), tiny.processor, grammar="llava-cot")
    with pytest.raises(ValueError, match="processor must be the model's, whose images are tokens 650, got a prompt"):
        generator.answer(SAMPLE.image, "Why?", "greedy")
    generator = SwiresGenerator(FAMILIES["llava"][0](), tiny.processor, grammar="llava-cot")
    with pytest.raises(ValueError, match="processor must be the model's, which has 97 tokens, got token"):
        generator.answer(None, "Why?", "greedy")


def test_a_grammar_that_the_tokenizer_cannot_spell(tiny):
    processor = deepcopy(tiny.processor)
    processor.tokenizer.backend_tokenizer.normalizer = Lowercase()
    with pytest.raises(ValueError, match="grammar must have tags that the tokenizer can spell, got '<SUMMARY>'"):
        SwiresGenerator(tiny.model, processor)
    SwiresGenerator(tiny.model, processor, grammar="think-answer")


def test_a_staged_search_asks_for_the_grammar(tiny):
    model = build_random_llava(vocab=641, image_token=640)
    generator = SwiresGenerator(model, tiny.processor)
    answer = generator.answer(None, "Why?", "best_of_n", n=2, max_new_tokens=4)
    assert answer.stages["answer"].outcome == "unclosed" and answer.violation == "answer is not closed"
    for search in ("swires", "stage_beam", "swires:published"):
        with pytest.raises(ValueError, match=r"grammar must be named for search='(swires|stage_beam)'.* got None"):
            generator.answer(None, "Why?", search)
    named = SwiresGenerator(model, tiny.processor, grammar="think")
    assert named.grammar is GRAMMARS["think"]
    with pytest.raises(ValueError, match="grammar must be one of"):
        SwiresGenerator(model, tiny.processor, grammar="thoughts")


def test_a_grammar_beside_the_weights(tiny, tmp_path):
    grammar = Grammar.sequence("PLAN", "SAY")
    tiny.model.save_pretrained(tmp_path)
    tiny.processor.save_pretrained(tmp_path)
    (tmp_path / "swires_grammar.json").write_text(json.dumps(grammar.to_dict()))
    assert SwiresGenerator.from_pretrained(tmp_path).grammar.to_dict() == grammar.to_dict()
    assert SwiresGenerator.from_pretrained(tmp_path, grammar="think").grammar is GRAMMARS["think"]
