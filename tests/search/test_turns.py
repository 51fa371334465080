"""Stages that the user's turns ask for: what is given to the model, when, and what becomes of it."""

import copy

import pytest
import torch
from helpers.scripted import WritingSession, turn_bytes
from test_conventions import WRITTEN, following, search

from llava_cot import EngineConfig, SwiresGenerator
from llava_cot.core import Extend
from llava_cot.data import shapes
from llava_cot.data.export import Item, to_groups, to_preferences, to_sft, to_unpaired
from llava_cot.data.forms import TextForm
from llava_cot.grammars import GRAMMARS
from llava_cot.literal import token_ids
from llava_cot.prompt import build_inputs
from llava_cot.scoring.agreement import look_ahead
from llava_cot.search import Budget, Search, StageBeamConfig, SwiresConfig
from llava_cot.search.events import StageFinal, TextDelta
from llava_cot.stages import Grammar, Outcome, asked
from llava_cot.trace import parse_trace

NAME = "llamav-o1"
GRAMMAR, (TEXT, BODIES, PATH) = GRAMMARS[NAME], WRITTEN[NAME]
REPLIES = ["I count.", "Here is one.", "\n1. One.\n\n2. Two.\n", "4"]


def extends(run):
    return [request for request in run.search.session.requests if isinstance(request, Extend)]


def varied(path, index):
    """Candidates of a stage differ, and those of the conclusion disagree."""
    stage = len([turn for turn in GRAMMAR.turns.values() if asked(turn) in path])
    return f"{REPLIES[stage]}{'' if index == 0 else index}"


def test_each_turn_is_given_once_to_each_parent():
    config = SwiresConfig(
        candidates=2, keep=2, grammar=GRAMMAR, cutoff=-0.5, retrace={"reasoning": "caption"}, max_rounds=3
    )
    answer, run = search(GRAMMAR, varied, config)
    assert [(r.stage, r.to) for r in run.search.retraces] == [("reasoning", "caption")] * 2
    nodes = run.search.nodes[1:]
    parents = {(node.parent.id, node.stage) for node in nodes if node.given}
    assert len(extends(run)) == len(parents) > 3  # no turn is given again after a retrace
    for node in nodes:
        expected = "" if node.stage == "summary" else GRAMMAR.turns[node.stage]
        assert node.turn == expected and node.given == (turn_bytes(expected, ()) if expected else ())
    again = parse_trace(answer.trace.to_json())
    assert again.path(again.data["answer"])[1]["given"] == list(turn_bytes(GRAMMAR.turns["caption"], ()))
    assert again.text(again.data["answer"]) == answer.text == TEXT
    assert answer.tokens == [*"".join(REPLIES).encode()]


@pytest.mark.parametrize("plan", ["greedy", "sample", "best_of_n", "majority"])
def test_a_whole_answer_is_a_node_for_each_reply(plan):
    answer, run = search(GRAMMAR, varied, plan)
    nodes = run.result[0].path()
    assert [node.stage for node in nodes] == PATH and all(node.closed and node.kept for node in nodes)
    assert answer.conclusion == "4" and answer.violation is None


def test_a_reply_that_its_own_limit_cuts_ends_where_the_next_turn_begins():
    config = SwiresConfig(candidates=1, grammar=GRAMMAR, cutoff=-5.0, max_stage_tokens={"summary": 3}, max_rounds=1)
    answer, run = search(GRAMMAR, varied, config)
    first = run.result[0].path()[0]
    assert first.text == "I c" and first.violation == "first comes summary, got the end (length)"
    assert answer.conclusion == "4" and answer.stages["summary"].text == "I c"


@pytest.mark.parametrize("spent", [len("I count."), len("I count.Here"), len("".join(REPLIES[:2]))])
def test_what_finishes_a_prefix_asks_the_turns_that_are_left(spent):
    budget = Budget(generated_tokens=4 * spent, reserve=0.75)
    answer, run = search(GRAMMAR, following(TEXT), "stage_beam", budget, candidates=1, keep=1)
    assert answer.trace.events("budget_spent")
    if 4 * spent >= len("".join(REPLIES)):
        assert answer.text == TEXT and run.result[0].closed
    else:
        assert len(answer.tokens) <= 4 * spent and not run.result[0].closed


def test_no_turn_is_given_behind_a_spent_limit_of_prompt_tokens():
    answer, run = search(GRAMMAR, following(TEXT), "stage_beam", Budget(prompt_tokens=1), candidates=1, keep=1)
    assert answer.text == REPLIES[0] and len(extends(run)) == 1
    assert answer.stages["conclusion"].outcome is Outcome.MISSING
    assert answer.violation == "after summary comes caption, got the end"


def test_look_ahead_asks_the_turns_that_are_left():
    config = StageBeamConfig(candidates=2, keep=1, scorer=look_ahead, grammar=GRAMMAR)
    answer, run = search(GRAMMAR, varied, config)
    assert answer.text == TEXT
    first = run.search.nodes[1:3]
    assert [node.score for node in first] == [1.0, 1.0]  # from both, the greedy answer is 4


def test_rows_never_train_what_was_given():
    config = StageBeamConfig(candidates=2, keep=1, grammar=GRAMMAR)
    answer, _ = search(GRAMMAR, varied, config)
    item = Item(answer.trace, "image.png", gold="4")
    turns, rows = list(GRAMMAR.turns.values()), [*to_sft([item])]
    assert [row["completion"][0]["content"][0]["text"] for row in rows] == REPLIES
    for at, row in enumerate(rows):
        said = [(message["role"], message["content"][-1]["text"]) for message in row["prompt"]]
        assert said[::2] == [("user", f"?\n{turns[0]}"), *(("user", turn) for turn in turns[1 : at + 1])]
        assert said[1::2] == [("assistant", reply) for reply in REPLIES[:at]]
    groups = [*to_groups([item])]
    assert [row["stages"][0] for row in groups] == PATH
    assert bytes(groups[2]["prefix_ids"]).decode() == TEXT.partition(REPLIES[2])[0]
    assert bytes(groups[2]["completion_ids"][0]).decode() == REPLIES[2]


def test_a_reply_that_right_and_wrong_answers_share_has_no_label(tiny):
    answer, _ = search(GRAMMAR, varied, StageBeamConfig(candidates=2, keep=1, grammar=GRAMMAR))
    rows = [*to_unpaired([Item(answer.trace, "image.png", gold="4")], TextForm(tiny.processor), by="answers")]
    assert [(row["completion"].partition("<|eot_id|>")[0], row["label"]) for row in rows] == [
        ("4", True),
        ("41", False),
    ]


def test_what_the_user_spells_is_no_tag():
    """A special token in a turn does not become visible text, as a stage tag that is a special token does."""
    assert CHAT.all_tags == []
    assert [stage.text for stage in CHAT.parse(f"a{asked(CHAT.turns['second'])}b").values()] == ["a", "b", ""]


def test_what_a_search_refuses():
    with pytest.raises(ValueError, match=r"search='token_beam' can't ask the user's turns of the grammar, \['summary'"):
        search(GRAMMAR, varied, "token_beam")
    with pytest.raises(ValueError, match="turn_tokens must be given for a grammar with turns, got None"):
        Search(WritingSession(varied, GRAMMAR), bytes, grammar=GRAMMAR)


# What the tiny model, which was trained on one turn, is asked. The last turn spells a special token.
CHAT = Grammar.sequence(
    "first",
    "second",
    "third",
    tags={"first": ("", "")},
    turns={"second": "How many are red?", "third": "Sure? <|eot_id|>"},
)


@pytest.mark.parametrize("max_stage_tokens", [{}, {"first": 7, "second": 5}])
def test_the_real_model_reads_one_chat(tiny, max_stage_tokens):
    """Every log-prob is transformers' in the whole chat, and the rows' prompts are what was read."""
    grammar = CHAT
    generator = SwiresGenerator(tiny.model, tiny.processor, grammar=grammar, engine=EngineConfig(page_size=4))
    sample = shapes.sample(802_000)
    config = SwiresConfig(
        candidates=2,
        keep=2,
        grammar=grammar,
        cutoff=10.0,
        retrace={"second": "second"},
        max_rounds=2,
        max_new_tokens=400,
        max_stage_tokens=max_stage_tokens,
    )
    prepared, asked_for = generator._turn_tokens, []
    generator._turn_tokens = lambda turn, written: asked_for.append(turn) or prepared(turn, written)
    answer = generator.answer(sample.image, sample.question, config)
    assert generator.engine.pages_in_use == 0
    nodes = answer.trace.nodes
    assert len(asked_for) - 2 == len({(node["parent"], node["stage"]) for node in nodes.values() if node["given"]})
    inputs = build_inputs(tiny.processor, sample.image, sample.question, "one")
    prompt = inputs["input_ids"]
    eot = tiny.processor.tokenizer.convert_tokens_to_ids("<|eot_id|>")
    for id, node in nodes.items():
        read = [token for each in answer.trace.path(id) for token in (*each["given"], *each["tokens"])]
        ids = torch.cat([prompt, torch.tensor([read])], 1)
        mask = inputs["cross_attention_mask"]
        mask = torch.cat([mask, mask[:, -1:].expand(-1, len(read), -1, -1)], 1)
        with torch.inference_mode():
            logits = tiny.model(**{**inputs, "input_ids": ids, "cross_attention_mask": mask}).logits[0]
        number = len(node["tokens"])
        rows = torch.log_softmax(logits[-number - 1 : -1].double(), -1)
        forced = rows.gather(1, torch.tensor(node["tokens"])[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(node["logprobs"]).double(), forced, atol=1e-4, rtol=0)
        if node["given"]:
            parent = nodes[node["parent"]]["tokens"]
            assert ([*parent, *node["given"]][-200:].count(eot)) >= 1 and (parent[-1] == eot) != (
                node["given"][0] == eot
            )
    form, item = TextForm(tiny.processor), Item(answer.trace, "image.png")
    for row in to_preferences([item], form, allow_unclosed=True):
        best = nodes[row["nodes"][0]]
        before = [token for each in answer.trace.path(best["parent"]) for token in (*each["given"], *each["tokens"])]
        read = prompt[0].tolist() + before + best["given"]
        assert token_ids(row["prompt"], tiny.processor.tokenizer) == read


def test_turns_are_streamed_as_whole_replies(tiny):
    grammar = CHAT
    generator = SwiresGenerator(tiny.model, tiny.processor, grammar=grammar, engine=EngineConfig(page_size=4))
    sample = shapes.sample(802_000)
    *events, finished = generator.stream(sample.image, sample.question, "greedy", max_new_tokens=300)
    assert not any(isinstance(event, TextDelta) for event in events)
    finals = [event.text for event in events if isinstance(event, StageFinal)]
    assert [*finals] == [node["text"] for node in finished.answer.trace.path(finished.answer.trace.data["answer"])]
    inputs = build_inputs(tiny.processor, sample.image, sample.question, "one")
    torch.manual_seed(0)
    whole = generator.generate(**inputs, search="greedy", max_new_tokens=300)
    read = [
        token
        for node in finished.answer.trace.path(finished.answer.trace.data["answer"])
        for token in (*node["given"], *node["tokens"])
    ]
    assert whole[0, inputs["input_ids"].shape[1] :].tolist() == read


def test_a_template_without_a_second_turn(tiny):
    processor = copy.deepcopy(tiny.processor)
    generator = SwiresGenerator(tiny.model, processor, grammar="llamav-o1", engine=EngineConfig(page_size=4))
    processor.chat_template = "{% if messages | length > 1 %}{{ raise_exception('one turn only') }}{% endif %}Q"
    with pytest.raises(ValueError, match="chat_template must take a second turn of the user, but it raises"):
        generator.plan("stage_beam")
    processor.chat_template = "{{ messages[0]['content'][0]['text'] }}"
    with pytest.raises(ValueError, match="chat_template must write a second turn of the user, got"):
        generator.plan("greedy")
    assert generator.engine.pages_in_use == 0


def test_the_first_turn_stands_behind_the_question(tiny):
    generator = SwiresGenerator(tiny.model, tiny.processor, grammar="llamav-o1", engine=EngineConfig(page_size=4))
    sample = shapes.sample(802_000)
    answers = [
        generator.answer(sample.image, question, "greedy", max_new_tokens=5)
        for question in (
            sample.question,
            [{"role": "user", "content": sample.question}],
            [{"role": "user", "content": [{"type": "text", "text": sample.question}, {"type": "image"}]}],
        )
    ]
    asked_for = f"{sample.question}\n{GRAMMAR.turns['summary']}"
    inputs = build_inputs(tiny.processor, sample.image, asked_for, "one")
    assert [answer.trace.data["question"] for answer in answers] == [sample.question] * 3
    assert answers[0].trace.data["prompt_tokens"] == inputs["input_ids"].shape[1]
    assert answers[0].tokens == answers[1].tokens
    assert {answer.trace.data["prompt_tokens"] for answer in answers} == {inputs["input_ids"].shape[1]}
