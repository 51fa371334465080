"""Every named grammar: a model that writes it, one that leaves it, and one that is cut."""

import json
import re

import pytest
from helpers.scripted import WritingSession, turn_bytes

from llava_cot.answer import Answer
from llava_cot.data.steps import to_steps
from llava_cot.data.traces import Item, TraceTree
from llava_cot.grammars import GRAMMARS, WHOLE, grammar_of, named_grammar
from llava_cot.scoring.agreement import self_consistency, vote
from llava_cot.search import Budget, StageBeamConfig, SwiresConfig, make_plan
from llava_cot.search.run import SearchRun
from llava_cot.search.search import Search, stop_tags
from llava_cot.stages import Grammar, Outcome, asked
from llava_cot.trace import Trace, parse_trace, trace_data

TURNS = GRAMMARS["llamav-o1"].turns
OK, CUT, MISSING, REPEATED = Outcome.COMPLETE, Outcome.UNCLOSED, Outcome.MISSING, Outcome.REPEATED

# name -> (what a model writes, the text of each stage, the stages of the path)
WRITTEN = {
    "llava-cot": (
        "<SUMMARY> a </SUMMARY>\n<CAPTION> b </CAPTION>\n<REASONING> c </REASONING>\n<CONCLUSION> 4 </CONCLUSION>",
        {"SUMMARY": "a", "CAPTION": "b", "REASONING": "c", "CONCLUSION": "4"},
        ["SUMMARY", "CAPTION", "REASONING", "CONCLUSION"],
    ),
    "think-answer": (
        "<think>two and two</think>\n<answer>4</answer>",
        {"think": "two and two", "answer": "4"},
        ["think", "answer"],
    ),
    "think": ("<think>\ntwo and two\n</think>\n\nIt is 4.", {"think": "two and two", "answer": "It is 4."}, None),
    "prompt-think": ("two and two\n</think>\n\nIt is 4.", {"think": "two and two", "answer": "It is 4."}, None),
    "mulberry": (
        "### Image Description:\nTwo apples.\n\n### Rationales:\nCount.\n\n### Let's think step by step.\n\n"
        "### Step 1:\nOne.\n\n### Step 2:\nTwo.\n\n### The final answer is: 4",
        {"description": "Two apples.", "rationales": "Count.", "plan": "", "step": "2:\nTwo.", "answer": "4"},
        ["description", "rationales", "plan", "step", "step", "answer"],
    ),
    "blank-lines": (
        "First, one.\n\nThen two.\n\nSo it is 4.",
        {"step": "Then two.", "answer": "So it is 4."},
        ["step", "step", "answer"],
    ),
    "numbered-steps": (
        "We count.\nStep 1: one.\nStep 2: two.\nAnswer: 4",
        {"introduction": "We count.", "step": "2: two.", "answer": "4"},
        ["introduction", "step", "step", "answer"],
    ),
    "llamav-o1": (
        f"I count.{asked(TURNS['caption'])}Here is one.{asked(TURNS['reasoning'])}\n1. One.\n\n2. Two.\n"
        f"{asked(TURNS['conclusion'])}4",
        {"summary": "I count.", "caption": "Here is one.", "reasoning": "1. One.\n\n2. Two.", "conclusion": "4"},
        ["summary", "caption", "reasoning", "conclusion"],
    ),
}


def search(grammar, write, plan="stage_beam", budget=None, **settings):
    """(the answer, the run) of a search on a model that writes."""
    session = WritingSession(write, grammar)
    resolved = make_plan(plan, {**settings, **({"budget": budget} if budget else {})}, grammar)

    def decode(tokens):
        return bytes(tokens).decode()

    searched = Search(
        session,
        decode,
        0,
        resolved.config.max_new_tokens,
        grammar=grammar,
        budget=budget,
        question="?",
        turn_tokens=turn_bytes,
    )
    run = SearchRun(searched, resolved)
    assert run.done and session.is_closed
    if run.error:
        raise run.error
    node = run.result[0]
    text, ended = "".join(asked(turn) + decode(tokens) for turn, tokens in node.replies()), node.finish == "eos"
    data = trace_data(
        model="",
        versions={},
        question="?",
        search=resolved.name,
        config=resolved.settings(),
        grammar=grammar,
        seed=0,
        bos="one",
        calibration=None,
        prompt_tokens=10,
        **searched.to_dict(),
        answers=[other.id for other in run.result],
        usage=searched.usage,
    )
    stages, violation = grammar.parse(text, ended=ended), grammar.violation(text, ended=ended)
    return Answer(text, list(node.path_tokens()), stages, Trace(data), searched.usage, grammar, violation), run


def following(text):
    """A model that writes ``text``, wherever it is."""

    def write(path, index):
        assert text.startswith(path), "the search goes on from what the model wrote"
        return text[len(path) :]

    return write


def beginning(grammar, text, length):
    """The shortest beginning of ``text`` in which ``length`` characters are the model's own."""
    turns = "|".join(map(re.escape, map(asked, grammar.turns.values()))) or "(?!)"
    own = [at for found in re.finditer(f"{turns}|(.)", text, re.DOTALL) if found[1] for at in [found.end()]]
    return text[: own[length - 1]] if length <= len(own) else text


def test_every_named_grammar_is_here():
    assert WRITTEN.keys() == GRAMMARS.keys()


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("plan", ["greedy", "stage_beam", "swires", "swires:published", "sentence_beam"])
def test_what_is_written_right(name, plan):
    grammar, (text, bodies, path) = GRAMMARS[name], WRITTEN[name]
    settings = {"cutoff": -5.0} if "swires" in plan else {}
    answer, run = search(grammar, following(text), plan, **settings)
    assert answer.text == text == answer.trace.text(answer.trace.data["answer"]) and answer.violation is None
    assert {stage: found.text for stage, found in answer.stages.items()} == bodies
    assert {found.outcome for found in answer.stages.values()} == {OK}
    assert answer.conclusion == list(bodies.values())[-1]
    if plan in ("stage_beam", "swires", "swires:published"):
        nodes = run.result[0].path()
        assert [node.stage for node in nodes] == (path or list(bodies))
        assert all(node.closed and node.violation is None for node in run.search.nodes[1:])
        for node in nodes:
            body = grammar.body(node.text, node.stage)
            assert body == bodies[node.stage] or path.count(node.stage) > 1
    again = parse_trace(json.loads(answer.trace.to_json()))
    assert again.grammar.to_dict() == grammar.to_dict()
    assert again.to_html()


@pytest.mark.parametrize("name", WRITTEN)
def test_what_is_cut(name):
    """At every length: nothing raises, and what was not closed is not complete."""
    grammar, (text, bodies, _) = GRAMMARS[name], WRITTEN[name]
    for length in range(1, len(text)):
        answer, run = search(grammar, following(text), max_new_tokens=length)
        assert answer.text == beginning(grammar, text, length) or run.result[0].closed
        assert run.result[0].closed or answer.violation is not None
        conclusion = answer.stages[grammar.conclusion]
        if conclusion.outcome is OK:  # only white space may be missing, or the model ended by itself
            assert conclusion.text == list(bodies.values())[-1]
        for part in grammar.parts(text[:length], ended=False):
            assert 0 <= part.start <= part.end <= length


OUTCOMES = [
    ("think-answer", "two</think><answer>4</answer>", "</think> closes what is not open", {"think": MISSING}),
    ("think-answer", "<think>a<answer>4</answer>", "<answer> opens inside think", {"think": CUT, "answer": OK}),
    ("think-answer", "<think>a</think>4", "after think comes answer, got the end", {"think": OK, "answer": MISSING}),
    ("think", "<think>a</think>", "after think comes answer, got the end", {"answer": MISSING}),
    ("think", "It is 4.", "first comes think, got the end", {"think": MISSING, "answer": MISSING}),
    ("think", "<think>a</think>4<think>b</think>", "<think> opens inside answer", {"think": REPEATED}),
    ("prompt-think", "It is 4.", "think is not closed", {"think": CUT, "answer": MISSING}),
    ("prompt-think", "<think>a</think>4", None, {"think": OK, "answer": OK}),
    ("prompt-think", "a</think>4</think>5", "</think> closes what is not open", {"think": OK, "answer": OK}),
    ("prompt-think", "a<think>b</think>4", "<think> opens inside think", {"think": REPEATED}),
    ("mulberry", "Two apples.", "first comes description, got the end", {"description": MISSING}),
    (
        "mulberry",
        "### Image Description: a\n### The final answer is: 4",
        "### The final answer is: opens inside description",
        {"description": CUT, "rationales": MISSING, "answer": OK},
    ),
    ("blank-lines", "4", None, {"step": MISSING, "answer": OK}),
    ("blank-lines", "one\n\n", "after step comes step or answer, got the end", {"step": OK, "answer": MISSING}),
    ("numbered-steps", "a\nAnswer: 4", "\nAnswer: opens inside introduction", {"step": MISSING, "answer": OK}),
]


@pytest.mark.parametrize("name, text, violation, outcomes", OUTCOMES)
def test_what_leaves_the_grammar(name, text, violation, outcomes):
    grammar = GRAMMARS[name]
    assert grammar.violation(text) == violation
    parsed = grammar.parse(text)
    assert {stage: parsed[stage].outcome for stage in outcomes} == outcomes
    answer, _ = search(grammar, following(text))
    assert answer.violation == violation and answer.text == text[: len(answer.text)]


def test_a_candidate_that_leaves_ranks_last():
    """Three of four candidates go on thinking to the end; the one that answers is kept."""

    def write(path, index):
        return ("so 4</think>4" if index == 2 else "and so on, for ever") if not path else "4"

    answer, run = search(GRAMMARS["prompt-think"], write)
    assert answer.conclusion == "4" and [node.closed for node in run.search.nodes[1:5]] == [False, False, True, False]
    assert run.search.nodes[1].violation == "first comes think, got the end (eos)"


def test_bodies_of_a_loop_with_headings():
    grammar = GRAMMARS["mulberry"]
    assert grammar.body(" 1: red cubes\n### Step", "step") == "1: red cubes"
    assert grammar.body("### Image Description: a cat\n### Rationales:", "description") == "a cat"
    assert GRAMMARS["numbered-steps"].body("\nStep 1: one\nStep ", "step") == "1: one"


@pytest.mark.parametrize("name, text", [("think", "<think>x</think>"), ("numbered-steps", "\nStep 1: x\nAnswer: 4")])
def test_a_stage_without_tags_and_text_is_none(name, text):
    """The search and the grammar say the same."""
    answer, run = search(GRAMMARS[name], following(text))
    assert answer.violation is not None
    assert any(node.violation for node in run.result[0].path()) or not run.result[0].closed


def test_a_grammar_from_json_is_the_generators_own():
    grammar = GRAMMARS["think-answer"]
    again = Grammar(**json.loads(json.dumps(grammar.to_dict())))
    make_plan(StageBeamConfig(grammar=again), {}, grammar)


THREE = Grammar.sequence("look", "think", "answer", tags={"answer": ("", "")})


def test_the_published_swires_with_three_stages():
    config = SwiresConfig.published(THREE, cutoff=-0.5, max_new_tokens=200)
    assert config.candidates == {"look": 4, "think": 4, "answer": 1} and config.retrace == {"think": "look"}

    def write(path, index):
        look = "<look>an apple</look>"
        return {"": look + "?", look: f"<think>{index} and</think>4"}.get(path, "4")

    answer, run = search(THREE, write, config)
    assert answer.conclusion == "4" and answer.violation is None
    # No mean log-prob of -1 passes: it goes back twice, and the last round passes.
    assert [(r.stage, r.to, r.round) for r in run.search.retraces] == [("think", "look", 2), ("think", "look", 3)]
    assert [len([n for n in run.search.nodes if n.stage == stage]) for stage in THREE.names] == [12, 12, 2]


@pytest.mark.parametrize("name", WRITTEN)
def test_budgets_and_exports(name):
    grammar, (text, _, path) = GRAMMARS[name], WRITTEN[name]
    answer, _ = search(grammar, following(text), budget=Budget(generated_tokens=3 * len(text)))
    assert answer.trace.events("budget_spent") or answer.text == text
    answer, _ = search(grammar, following(text))
    item = Item(answer.trace, "image.png", gold=answer.conclusion)
    tree = TraceTree(item)
    assert tree.is_right(tree.answer) is True
    rows = [*to_steps([item])]
    assert [row["stages"] for row in rows] == [path or list(grammar.names)]
    assert "".join(rows[0]["completions"]) == text
    whole, _ = search(grammar, following(text), "greedy")
    rows = [*to_steps([Item(whole.trace, "image.png", gold=whole.conclusion)])]
    assert [row["stages"] for row in rows] == [path or list(grammar.names)]
    assert "".join(rows[0]["completions"]) == text


@pytest.mark.parametrize("name", ["think", "prompt-think", "blank-lines", "llamav-o1"])
@pytest.mark.parametrize("scorer", [vote, self_consistency, "look_ahead"])
def test_scorers_of_agreement(name, scorer):
    """Two of three candidates agree, by the text between the tags or behind them."""
    grammar, text = GRAMMARS[name], WRITTEN[name][0]

    def write(path, index):
        other = text.replace("4", "5").replace("two and two", "two, three").replace("one", "two")
        return (other if index == 1 else text)[len(path) :]

    config = StageBeamConfig(candidates=3, keep=1, scorer=scorer, grammar=grammar, final_scope="path")
    answer, _ = search(grammar, write, config)
    assert answer.text == text


def test_the_texts_of_all_stages_tell_where_they_start():
    for name, (text, _, path) in WRITTEN.items():
        starts = GRAMMARS[name].starts(text)
        assert [stage for _, stage in starts] == (path or list(GRAMMARS[name].names))
        assert [at for at, _ in starts] == sorted(at for at, _ in starts) and starts[0][0] == 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            {"follows": {"A": ["B"], "B": []}, "tags": {"A": ("", ""), "B": ("", "b")}},
            r"tags\['A'\] must have a closing",
        ),
        ({"follows": {"A": []}, "start": ["A"], "opened": "B"}, r"opened must name stages of \['A'\], got 'B'"),
        ({"follows": {"A": ["B"], "B": []}, "opened": "B"}, "opened must be a stage that may come first, got 'B'"),
        ({"follows": {"A": []}, "turns": {"A": " "}}, r"turns\['A'\] must be what the user says, got ' '"),
        ({"follows": {"A": []}, "turns": {"B": "?"}}, r"turns must name stages of \['A'\], got 'B'"),
        ({"follows": {"A": []}, "turns": {"A": "?"}, "tags": {"A": ("<a>", "")}}, r"tags\['A'\] must be absent"),
        ({"follows": {"A": ["B"], "B": []}, "turns": {"B": "?"}}, r"tags\['A'\] must have no closing tag, since EOS"),
        ({"follows": {"A": []}, "turns": {"A": "?"}, "opened": "A"}, "must ask for the only stage that may come first"),
        (
            {"follows": {"A": ["B", "C"], "B": [], "C": []}, "turns": {"B": "?"}, "tags": {"A": ("<a>", "")}},
            r"follows\['A'\] must be one stage, since a turn asks for it, got \['B', 'C'\]",
        ),
        (
            {"follows": {"A": ["B"], "B": ["A", "C"], "C": []}, "turns": {"A": "?"}, "tags": {"B": ("<b>", "")}},
            r"turns\['A'\] must ask for a stage that comes first or later, got both",
        ),
        (
            {"follows": {"A": ["A", "B"], "B": []}, "tags": {"A": ("# A", ""), "B": ("# B", "")}},
            r"tags\['A'\] must have a closing tag, or 'A' must be the only stage .* and not follow itself, got \['A'\]",
        ),
        (
            {"follows": {"A": ["B", "C"], "B": [], "C": []}, "tags": {"B": ("# B", ""), "C": ("# C", "")}},
            r"tags\['B'\] must have a closing tag, or 'B' must be the only stage .*, got \['B', 'C'\]",
        ),
        (
            {"follows": {"A": ["B", "C"], "B": [], "C": []}, "tags": {"B": ("", ""), "C": ("", "")}},
            "tags must tell 'B' and 'C' apart",
        ),
    ],
)
def test_what_no_grammar_may_say(arguments, message):
    with pytest.raises(ValueError, match=message):
        Grammar(**arguments)


def test_names():
    assert named_grammar("think") is GRAMMARS["think"]
    with pytest.raises(ValueError, match=r"grammar must be one of \['llava-cot', .*\] or a Grammar, got 'thoughts'"):
        named_grammar("thoughts")
    assert WHOLE.parse("4")["answer"].text == WHOLE.conclusion.replace("answer", "4") and WHOLE.stops == ()
    for grammar in GRAMMARS.values():
        tags = stop_tags(grammar)
        assert len(set(tags)) == len(tags) and tags[: len(grammar.stops)] == [stop.text for stop in grammar.stops]


def test_what_a_template_or_a_tokenizer_shows(tiny):
    from copy import deepcopy

    processor = deepcopy(tiny.processor)
    assert grammar_of(processor) is None
    template = processor.chat_template
    processor.chat_template = template.replace(
        "assistant<|end_header_id|>\n\n", "assistant<|end_header_id|>\n\n<think>\n"
    )
    assert grammar_of(processor) is GRAMMARS["prompt-think"]
    processor.chat_template = template
    processor.tokenizer.add_tokens(["<think>", "</think>"])
    assert grammar_of(processor) is None  # a Qwen3 that does not think has these too
    processor.tokenizer.add_tokens(["<answer>", "</answer>"])
    assert grammar_of(processor) is GRAMMARS["think-answer"]
