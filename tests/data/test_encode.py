import pytest
from PIL import Image
from rich.text import Text
from tokenizers import processors
from transformers import AutoConfig, AutoProcessor, MllamaProcessor

from llava_cot.data.conversations import Conversation, Turn, parse_conversation
from llava_cot.data.encode import encode, expand_images
from llava_cot.data.example import IGNORE_INDEX
from llava_cot.data.inspect import show
from llava_cot.families import training_of
from llava_cot.prompt import build_inputs
from llava_cot.stages import LLAVA_COT, Grammar, render
from llava_cot.tiny import tiny_path
from llava_cot.tiny_qwen import tiny_qwen_path
from tools.small_world.processor import CHAT_TEMPLATE

QUESTION = "How many objects remain?"
STAGES = {"SUMMARY": "I count.", "CAPTION": "A blue square.", "REASONING": "1 - 0 = 1.", "CONCLUSION": "1"}
ANSWER = render(STAGES)
TWO = Conversation(
    "two", ("a.png",), (Turn(QUESTION, ANSWER), Turn("Is it é or 猫?", render(STAGES | {"CONCLUSION": "é"})))
)


def load() -> MllamaProcessor:
    return AutoProcessor.from_pretrained(tiny_path())


@pytest.fixture(scope="module")
def processor():
    return load()


def with_template(template: str) -> MllamaProcessor:
    made = load()
    return MllamaProcessor(made.image_processor, made.tokenizer, chat_template=template)


def learnt(example, processor) -> str:
    return processor.tokenizer.decode([label for label in example.labels if label != IGNORE_INDEX])


@pytest.mark.parametrize("bos", ["one", "released"])
def test_the_prompt_is_what_the_engine_sees(processor, bos):
    example = encode(TWO, processor, bos=bos)
    prompt = build_inputs(processor, Image.new("RGB", (48, 48)), QUESTION, bos)["input_ids"][0].tolist()
    assert example.input_ids[: len(prompt)] == prompt
    assert example.input_ids.count(processor.tokenizer.bos_token_id) == (2 if bos == "released" else 1)
    assert example.labels[: len(prompt)] == [IGNORE_INDEX] * len(prompt)
    assert example.labels[len(prompt)] != IGNORE_INDEX


@pytest.mark.parametrize(
    "path, size", [(tiny_path(), (48, 48)), (tiny_qwen_path(), (48, 48)), (tiny_qwen_path(), (20, 90))]
)
def test_an_image_takes_the_tokens_that_the_engine_gives_it(path, size, tmp_path):
    processor, image = AutoProcessor.from_pretrained(path), Image.new("RGB", size)
    image.save(tmp_path / "a.png")
    short = encode(TWO, processor, image_folder=tmp_path)
    example = expand_images(short, processor, training_of(AutoConfig.from_pretrained(path)))
    prompt = build_inputs(processor, image, QUESTION, "one")["input_ids"][0].tolist()
    assert example.input_ids[: len(prompt)] == prompt and example.images == [str(tmp_path / "a.png")]
    assert learnt(example, processor) == learnt(short, processor)
    kept = [at for at, token in enumerate(example.input_ids) if token != processor.image_token_id]
    bare = [at for at, token in enumerate(short.input_ids) if token != processor.image_token_id]
    for name in ("input_ids", "labels", "stages"):
        assert [getattr(example, name)[at] for at in kept] == [getattr(short, name)[at] for at in bare]
        assert len(getattr(example, name)) == len(example.input_ids)


def test_a_template_without_a_bos_gets_one():
    processor = with_template(CHAT_TEMPLATE.removeprefix("{{ bos_token }}"))
    assert encode(TWO, processor).input_ids == encode(TWO, load()).input_ids


def test_all_turns_in_one_text_are_the_same_tokens(processor):
    messages = []
    for index, turn in enumerate(TWO.turns):
        image = [{"type": "image"}] if index == 0 else []
        messages.append({"role": "user", "content": [*image, {"type": "text", "text": turn.question}]})
        messages.append({"role": "assistant", "content": turn.answer})
    text = processor.apply_chat_template(messages)
    assert encode(TWO, processor).input_ids == processor.tokenizer(text, add_special_tokens=False)["input_ids"]


def test_answers_and_the_ends_of_their_turns_are_learnt(processor):
    example = encode(TWO, processor)
    assert learnt(example, processor) == "".join(f"{turn.answer}<|eot_id|>" for turn in TWO.turns)
    assert all(label in (IGNORE_INDEX, token) for label, token in zip(example.labels, example.input_ids, strict=True))
    assert processor.image_token_id not in example.labels
    assert all((stage >= 0) == (label != IGNORE_INDEX) for stage, label in zip(example.stages, example.labels))


def test_what_follows_a_stage_belongs_to_it(processor):
    example = encode(TWO, processor)
    parts = [
        processor.tokenizer.decode([token for token, stage in zip(example.input_ids, example.stages) if stage == index])
        for index in range(4)
    ]
    ends = "\n\n", "\n\n", "\n\n", "<|eot_id|>"
    for index, name in enumerate(LLAVA_COT.names):
        first, second = (
            f"<{name}> {stages[name]} </{name}>{ends[index]}" for stages in (STAGES, STAGES | {"CONCLUSION": "é"})
        )
        assert parts[index] == first + second


def test_tokens_outside_of_every_stage(processor):
    example = encode(Conversation("x", (), (Turn("?", f"So: {ANSWER}"), Turn("?", "Just 1."))), processor)
    outside = [t for t, label, s in zip(example.input_ids, example.labels, example.stages) if s < 0 <= label]
    assert processor.tokenizer.decode(outside) == "So: Just 1.<|eot_id|>"
    assert example.stages[0] == -1 and {-1, 0, 1, 2, 3} == set(example.stages)


def test_spaces_belong_to_the_stage_before_them_even_if_the_offsets_are_trimmed(processor):
    trimmed = load()
    backend = trimmed.tokenizer.backend_tokenizer
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), backend.post_processor])
    conversation = Conversation("x", (), (Turn("?", ANSWER.replace("\n\n<", " \n\n <")),))
    example = encode(conversation, trimmed)
    assert example == encode(conversation, processor)
    caption = [token for token, stage in zip(example.input_ids, example.stages) if stage == 1]
    assert processor.tokenizer.decode(caption) == "<CAPTION> A blue square. </CAPTION> \n\n "


def test_another_grammar(processor):
    grammar = Grammar({"LOOK": ["SAY"], "SAY": []}, tags={"SAY": ("[", "]")})
    example = encode(Conversation("x", (), (Turn("?", "<LOOK> a </LOOK> [ b ]"),)), processor, grammar=grammar)
    said = processor.tokenizer.decode([t for t, s in zip(example.input_ids, example.stages) if s == 1])
    assert said.lstrip() == "[ b ]<|eot_id|>"


def test_images_stand_before_the_first_question(processor, tmp_path):
    row = {
        "id": 7,
        "image": ["a.png", "b/c.png"],
        "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "1"}] * 2,
    }
    example = encode(parse_conversation(row), processor, image_folder=tmp_path)
    assert example.images == [str(tmp_path / "a.png"), str(tmp_path / "b" / "c.png")]
    at = [index for index, token in enumerate(example.input_ids) if token == processor.image_token_id]
    assert at == [at[0], at[0] + 1]
    assert processor.tokenizer.decode(example.input_ids[: at[0]]).endswith("user<|end_header_id|>\n\n")
    assert encode(parse_conversation(row | {"image": None}), processor).images == []


def test_a_line_break_after_the_end_of_the_turn_is_not_learnt():
    example = encode(TWO, with_template(CHAT_TEMPLATE.replace("'<|eot_id|>'", "'<|eot_id|>\n'")))
    assert learnt(example, load()) == learnt(encode(TWO, load()), load())


def test_the_date_of_llamas_template_is_always_the_same():
    template = CHAT_TEMPLATE.replace(
        "{{ bos_token }}", "{{ bos_token }}{{ date_string | default(strftime_now('%d')) }}"
    )
    processor = with_template(template)
    assert "26 Jul 2024" in processor.tokenizer.decode(encode(TWO, processor).input_ids)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            CHAT_TEMPLATE.replace(
                "{% for message in messages %}", "{{ messages | length }}{% for message in messages %}"
            ),
            "continuation",
        ),
        (CHAT_TEMPLATE.replace("{{ part['text'] }}", "{{ part['text'] | upper }}"), "continuation"),
        (CHAT_TEMPLATE.replace("<|eot_id|>", "\n"), "must end an assistant's turn with a special token"),
        (CHAT_TEMPLATE.replace("<|image|>", ""), "an image token 1 times, got 0"),
    ],
)
def test_a_template_that_does_not_fit(template, message):
    with pytest.raises(ValueError, match=f"conversation 'two': .*{message}"):
        encode(TWO, with_template(template))


@pytest.mark.parametrize(
    ("question", "answer", "message"),
    [
        ("?", "1<|eot_id|>", "turn 0's answer must be plain text, got the special token '<|eot_id|>'"),
        ("?", "<|image|>", "turn 0's answer must be plain text, got the special token '<|image|>'"),
    ],
)
def test_special_tokens_in_an_answer(processor, question, answer, message):
    with pytest.raises(ValueError, match=f"conversation 'x': .*{message}".replace("|", r"\|").replace("?", r"\?")):
        encode(Conversation("x", (), (Turn(question, answer),)), processor)


def test_show_is_the_text_with_a_style_for_each_stage(processor):
    example = encode(TWO, processor)
    shown = show(example, processor, LLAVA_COT.names)
    assert isinstance(shown, Text)
    assert shown.plain.endswith(processor.tokenizer.decode(example.input_ids) + "\n")
    styles = {shown.plain[span.start : span.end]: str(span.style) for span in shown.spans}
    assert styles["<|image|>"] == "reverse"
    assert styles["<CAPTION> A blue square. </CAPTION>\n\n"] == "cyan"
    assert styles["<CONCLUSION> é </CONCLUSION><|eot_id|>"] == "magenta"
    assert styles["How many objects remain?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"] == "dim"
    assert f"{sum(label >= 0 for label in example.labels)} of {len(example.labels)}" in shown.plain
