"""Training data of traces: what every row says is in its trace, and its log-probs are those of the model."""

import json
import sys
from dataclasses import asdict
from itertools import chain

import pytest
import torch

from llava_cot import cli
from llava_cot.core import Usage
from llava_cot.data import shapes
from llava_cot.data.export import (
    FORMATS,
    MESSAGES,
    Item,
    TextForm,
    export_file,
    read_items,
    to_groups,
    to_preferences,
    to_sft,
    to_steps,
    to_unpaired,
    trace_id,
    write_jsonl,
)
from llava_cot.data.traces import TraceTree, text_of
from llava_cot.prompt import build_inputs
from llava_cot.scoring import Calibration
from llava_cot.stages import Grammar
from llava_cot.trace import Trace, parse_trace
from llava_cot.trace.schema import TRACE_VERSION
from llava_cot_kernels.reference.sampling import masses

SAMPLES = [shapes.sample(seed) for seed in (500_010, 500_011)]
SEARCHES = ("swires", "stage_beam", "best_of_n")
NEEDS_FORM = ("preferences", "unpaired")


@pytest.fixture(scope="module")
def items(tiny):
    """Each search's traces as JSON, as they come out of a file; the first sample's question and image come first."""
    images, questions = [s.image for s in SAMPLES], [s.question for s in SAMPLES]
    return [
        Item(parse_trace(answer.trace.to_json()), f"images/{index}.png", gold=SAMPLES[index].answer)
        for search in SEARCHES
        for index, answer in enumerate(tiny.answer_batch(images, questions, search, seed=1, max_new_tokens=200))
    ]


@pytest.fixture(scope="module")
def text_form(tiny):
    return TextForm(tiny.processor)


def rows_of(name, items, text_form, **settings):
    return [*FORMATS[name](items, **settings, **({"form": text_form} if name in NEEDS_FORM else {}))]


def is_null_free(value):
    if isinstance(value, dict | list):
        return all(map(is_null_free, value.values() if isinstance(value, dict) else value))
    return value is not None


@pytest.mark.parametrize("name", FORMATS)
def test_rows_reload_and_their_nodes_are_in_the_trace(items, text_form, tmp_path, name):
    trees = {tree.trace_id: tree for tree in map(TraceTree, items)}
    assert len(trees) == len(items)
    rows = rows_of(name, items, text_form)
    assert write_jsonl(rows, tmp_path / "rows.jsonl") == len(rows) > 0
    loaded = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text("utf-8").splitlines()]
    assert loaded == rows and is_null_free(rows)
    assert {tuple(row) for row in rows} == {tuple(rows[0])}  # one set of columns
    seen = set()
    for row in loaded:
        tree = trees[row["trace_id"]]
        assert row["version"] == 1 and row["images"] == [tree.item.image]
        nodes = [tree.nodes[id] for id in row["nodes"]]
        assert tree.question in str(row["prompt"])
        written = {
            "sft": lambda row: [row["completion"][0]["content"][0]["text"]],
            "preferences": lambda row: [row["chosen"], row["rejected"]],
            "unpaired": lambda row: [row["completion"]],
            "steps": lambda row: ["".join(row["completions"])],
            "groups": lambda row: row["completions"],
        }[name](row)
        expected = [node.text for node in nodes]
        if name in ("sft", "steps"):
            expected = [text_of(dict.fromkeys(nodes))]
        ends = ["<|eot_id|>" if name in NEEDS_FORM and tree.is_finished(node) else "" for node in nodes]
        assert written == [text + end for text, end in zip(expected, ends)]
        seen.add(row["trace_id"])
    assert len(seen) == len(items) or name in ("preferences", "sft")


@pytest.mark.parametrize("settings", [{}, {"by": "answers", "missing_reward": 0.0, "scale": True}])
def test_log_probs_of_groups_match_a_plain_forward(items, tiny, fresh_tiny, settings):
    compared = 0
    for row in to_groups(items, **settings):
        sample = SAMPLES[int(row["images"][0].split("/")[1][0])]
        inputs = build_inputs(tiny.processor, sample.image, sample.question, "one")
        assert inputs["input_ids"].shape[1] == row["prompt_tokens"]
        assert sum(row["advantages"]) == pytest.approx(0, abs=1e-9)
        for column in ("completion_ids", "rewards", "stages", "closed", "kept", "nodes"):
            assert len(row[column]) == len(row["completions"]) >= 2
        for ids, *logged in zip(row["completion_ids"], row["logprobs"], row["sampling_logprobs"]):
            logits = forced_logits(fresh_tiny, inputs, row["prefix_ids"], ids)
            found = torch.tensor(logged)  # [2, tokens]
            expected = torch.stack(log_probs(logits, torch.tensor(ids), **row["sampling"]))
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
            compared += len(ids)
    assert compared > 500


def forced_logits(model, inputs, prefix, completion):
    """[tokens of the completion, V]: what ``model`` says before each of them."""
    ids = torch.cat([inputs["input_ids"], torch.tensor([[*prefix, *completion]])], dim=1)
    mask = inputs["cross_attention_mask"]
    mask = torch.cat([mask, mask[:, -1:].expand(-1, ids.shape[1] - mask.shape[1], -1, -1)], dim=1)
    with torch.no_grad():
        logits = model(**{**inputs, "input_ids": ids, "cross_attention_mask": mask}).logits
    return logits[0, -len(completion) - 1 : -1].float()


def log_probs(logits, ids, *, temperature, top_k, top_p, min_p):
    """Under the model, and under what temperature and filters leave of it."""
    full = (len(logits),)
    x = (logits - logits.max(1, keepdim=True).values) / temperature
    mass = masses(x, torch.full(full, top_k), torch.full(full, top_p), torch.full(full, min_p), True)
    drawn = x.gather(1, ids[:, None])[:, 0].double() - (mass.sum(1).double() / 2.0**40).log()
    return logits.log_softmax(1).gather(1, ids[:, None])[:, 0], drawn.float()


def test_text_prompts_are_the_tokens_that_the_generator_saw(items, tiny, text_form):
    trees = {tree.trace_id: tree for tree in map(TraceTree, items)}
    for row in to_preferences(items, text_form):
        tree = trees[row["trace_id"]]
        chosen, rejected = (tree.nodes[id] for id in row["nodes"])
        assert chosen.parent == rejected.parent == row["parent"]
        sample = SAMPLES[int(tree.item.image[7])]
        prompt = build_inputs(tiny.processor, sample.image, sample.question, "one")["input_ids"][0].tolist()
        drawn = [token for node in tree.prefix(chosen) for token in node.tokens]
        assert tiny.processor.tokenizer(row["prompt"], add_special_tokens=False).input_ids == prompt + drawn
    two = TextForm(tiny.processor).prompt("?", [], "released")
    assert two.startswith(tiny.processor.tokenizer.bos_token * 2)


def test_messages_and_text_are_one_conversation(items, tiny, text_form):
    """What TRL makes of the messages of whole answers."""
    render = tiny.processor.apply_chat_template
    for messages, text in zip(to_sft(items, keep_wrong=True), to_sft(items, text_form, keep_wrong=True), strict=True):
        assert render(messages["prompt"] + messages["completion"]) == text["prompt"] + text["completion"]
        assert render(messages["prompt"], add_generation_prompt=True) == text["prompt"]


@pytest.mark.parametrize("margin", [0.0, 0.005])
def test_pairs_differ_by_the_margin_and_fit_in_length(items, text_form, margin):
    rows = [*to_preferences(items, text_form, min_margin=margin, max_length_ratio=1.2, max_length_gap=1)]
    trees = {tree.trace_id: tree for tree in map(TraceTree, items)}
    for row in rows:
        best, worst = (trees[row["trace_id"]].nodes[id] for id in row["nodes"])
        assert row["values"] == [best.score, worst.score] and best.score - worst.score >= max(margin, 1e-12)
        assert abs(len(best.tokens) - len(worst.tokens)) <= 1
        assert best.closed and worst.closed and best.text != worst.text
    assert len(rows) > 0 and len(rows) < len([*to_preferences(items, text_form)])


def node(id, parent, stage, text, score, **changes):
    made = dict(id=id, parent=parent, stage=stage, text=text, tokens=[id] * len(text.split()), score=score)
    made |= dict(logprobs=[-1.0], sampling_logprobs=[-0.5], finish="tag", closed=True, kept=False, error=None)
    made |= dict(round=1, index=0, seed=0, entropies=[], violation=None, notes={}, seconds=0.0, turn="", given=[])
    return made | changes


def trace(nodes, answer, **changes):
    names = ("SUMMARY", "CONCLUSION")
    made = dict(
        version=TRACE_VERSION, question="How many?", search="swires", seed=0, bos="one", model="m", prompt_tokens=9
    )
    made |= dict(versions={}, calibration=None, answers=[] if answer is None else [answer], error=None)
    made |= dict(usage=asdict(Usage()))
    made |= dict(config=dict(temperature=0.6, top_k=0, top_p=0.9, min_p=0.0, scorer="confidence"), events=[])
    made |= dict(grammar=Grammar.sequence(*names).to_dict(), nodes=nodes, answer=answer)
    return made | changes


def two_stages(**changes):
    """Two summaries; two conclusions under the first, one right, and one under the second, wrong."""
    nodes = [
        node(1, 0, "SUMMARY", "<SUMMARY> a b </SUMMARY>", -1.0, kept=True),
        node(2, 0, "SUMMARY", "<SUMMARY> c </SUMMARY>", -0.5, kept=True),
        node(3, 1, "CONCLUSION", "<CONCLUSION> 4 </CONCLUSION>", -0.1, kept=True),
        node(4, 1, "CONCLUSION", "<CONCLUSION> 5 </CONCLUSION>", -0.2),
        node(5, 2, "CONCLUSION", "<CONCLUSION> 5 </CONCLUSION>", -0.3),
    ]
    for id, change in changes.pop("of", {}).items():
        nodes[id - 1] |= change
    return trace(nodes, changes.pop("answer", 3), **changes)


def one(data, **changes):
    return [Item(parse_trace(data), "a.png", **{"gold": "4.0", **changes})]


def test_a_pair_never_says_the_opposite_of_the_truth():
    (pair,) = to_preferences(one(two_stages()), MESSAGES)
    assert pair["nodes"] == [3, 4] and pair["values"] == [-0.1, -0.2]  # 2 scores above 1, and 1 has the right answer
    assert pair["prompt"][1] == {"role": "assistant", "content": [{"type": "text", "text": "<SUMMARY> a b </SUMMARY>"}]}
    unknown = to_preferences(one(two_stages(), gold=None), MESSAGES)
    assert [row["nodes"] for row in unknown] == [[2, 1], [3, 4]]
    by_answers = to_preferences(one(two_stages()), MESSAGES, by="answers")
    assert [(row["nodes"], row["values"]) for row in by_answers] == [([1, 2], [0.5, 0.0]), ([3, 4], [1.0, 0.0])]


@pytest.mark.parametrize("change", [{"error": "it raised"}, {"score": "-inf"}, {"score": float("nan")}])
def test_what_has_no_finite_score_is_never_a_label(change):
    items = one(two_stages(of={4: change}))
    assert not [*to_preferences(items, MESSAGES)]
    assert all(4 not in row["nodes"] for by in ("score", "answers") for row in to_unpaired(items, MESSAGES, by=by))
    assert [row["nodes"] for row in to_steps(items)] == [[1, 3], [2, 5]]
    assert [row["nodes"] for row in to_groups(items)] == [[1, 2]]  # without one of it a group would be biased
    (_, group) = to_groups(items, missing_reward=-2.1)
    assert group["nodes"] == [3, 4] and group["advantages"] == pytest.approx([1.0, -1.0])
    assert not [*to_sft(one(two_stages(answer=4, of={4: change}), gold="5"))]


def test_unclosed_candidates_and_equal_texts_make_no_pair():
    unclosed = one(two_stages(of={4: {"closed": False, "finish": "length"}}))
    assert not [*to_preferences(unclosed, MESSAGES)]
    assert [row["nodes"] for row in to_preferences(unclosed, MESSAGES, allow_unclosed=True)] == [[3, 4]]
    same = one(two_stages(of={4: {"text": "<CONCLUSION> 4 </CONCLUSION> "}}), gold=None)
    assert [row["nodes"] for row in to_preferences(same, MESSAGES)] == [[2, 1]]


def test_the_worst_that_fits_in_length():
    nodes = [
        node(1, 0, "SUMMARY", "<SUMMARY> a </SUMMARY>", -0.1),
        node(2, 0, "SUMMARY", "<SUMMARY> b c </SUMMARY>", -0.2),
        node(3, 0, "SUMMARY", "<SUMMARY> d e f g </SUMMARY>", -0.3),  # 6 words: twice as many as 1 has
    ]
    items = one(trace(nodes, 1))
    for limits, worst in (
        ({}, 3),
        ({"max_length_gap": 2}, 2),
        ({"max_length_ratio": 1.5}, 2),
        ({"max_length_gap": 3}, 3),
    ):
        assert [row["nodes"] for row in to_preferences(items, MESSAGES, **limits)] == [[1, worst]]
    assert not [*to_preferences(items, MESSAGES, max_length_gap=2, min_margin=0.15)]
    assert not [*to_preferences(items, MESSAGES, max_length_ratio=1)]


def test_winners_are_whole_and_not_known_to_be_wrong():
    (row,) = to_sft(one(two_stages()))
    assert row["nodes"] == [1, 3] and row["prompt"][-1]["role"] == "user"
    assert not [*to_sft(one(two_stages(), gold="5"))]
    assert len([*to_sft(one(two_stages(), gold="5"), keep_wrong=True)]) == 1
    assert len([*to_sft(one(two_stages(), gold=None))]) == 1
    assert not [*to_sft(one(two_stages(answer=1)))]


def test_labels():
    by_score = [(row["nodes"], row["label"]) for row in to_unpaired(one(two_stages()), MESSAGES)]
    assert by_score == [([2], True), ([1], False), ([3], True), ([4], False)]
    assert not [*to_unpaired(one(two_stages()), MESSAGES, min_margin=0.3)]
    by_answers = [(row["nodes"], row["label"]) for row in to_unpaired(one(two_stages()), MESSAGES, by="answers")]
    assert by_answers == [([1, 3], True), ([1, 4], False), ([2, 5], False)]
    verdicts = one(two_stages(), gold=None, is_right={3: False, 4: True})
    assert [row["label"] for row in to_unpaired(verdicts, MESSAGES, by="answers")] == [False, True]
    function = one(two_stages(), gold=None, is_right=lambda conclusion: conclusion == "5")
    assert [row["label"] for row in to_unpaired(function, MESSAGES, by="answers")] == [False, True, True]


def test_step_values():
    rows = [*to_steps(one(two_stages()))]
    assert [row["values"] for row in rows] == [[0.5, 1.0], [0.5, 0.0], [0.0, 0.0]]
    assert [row["labels"] for row in rows] == [[True, True], [True, False], [False, False]]
    assert {source for row in rows for source in row["sources"]} == {"answers"}
    ranked = [*to_steps(one(two_stages(), gold=None), threshold=0.6)]
    assert [row["values"] for row in ranked] == [[0.0, 1.0], [0.0, 0.5], [1.0, 0.0]]
    assert ranked[1]["labels"] == [False, False] and ranked[0]["sources"] == ["rank", "rank"]
    scores = {stage: [score / 100 for score in range(-100, 1)] for stage in ("SUMMARY", "CONCLUSION")}
    calibration = Calibration.fit("confidence", "d", scores)
    (first, *_) = to_steps(one(two_stages(), gold=None), calibration=calibration)
    assert first["values"] == pytest.approx([0.0, 0.9], abs=0.01) and first["sources"] == ["calibration"] * 2
    other = Calibration("vote", "d", {})
    with pytest.raises(ValueError, match=r"calibration must be of scorer 'confidence' of trace '.*', got 'vote'"):
        list(to_steps(one(two_stages()), calibration=other))


def test_a_whole_answer_is_cut_into_its_stages():
    text = "<SUMMARY> a </SUMMARY>\n\n<CONCLUSION> 4 </CONCLUSION>\n"
    whole = trace([node(1, 0, None, text, -1.0, finish="eos")], 1)
    (row,) = to_steps(one(whole))
    assert row["stages"] == ["SUMMARY", "CONCLUSION"] and "".join(row["completions"]) == text
    assert row["nodes"] == [1, 1] and row["values"] == [1.0, 1.0]


def test_groups():
    first, second = to_groups(one(two_stages()), scale=True)
    assert first["rewards"] == [-1.0, -0.5] and first["parent"] == 0 and first["prefix_ids"] == []
    assert second["prefix_ids"] == [1] * 4 and second["sampling"]["temperature"] == 0.6
    assert second["advantages"] == pytest.approx([0.05 / (0.1 / 2**0.5 + 1e-4), -0.05 / (0.1 / 2**0.5 + 1e-4)])
    (ends,) = (row for row in to_groups(one(two_stages()), by="answers") if row["parent"])
    assert ends["rewards"] == [1.0, 0.0] and ends["advantages"] == [0.5, -0.5]
    stopped = two_stages(of={4: {"finish": "stopped"}})
    assert [row["nodes"] for row in to_groups(one(stopped))] == [[1, 2]]
    finish = [
        {"event": "budget_spent", "seconds": 0.1, "what": "seconds"},
        {"event": "generated", "seconds": 0.2, "nodes": [4]},
    ]
    assert [row["nodes"] for row in to_groups(one(two_stages(events=finish)))] == [[1, 2]]  # 4 is greedy, 3 alone


def test_the_id_is_that_of_the_content(items):
    def of(**changes):
        return trace_id(parse_trace(two_stages(**changes)))

    trace = items[0].trace
    assert trace_id(trace) == TraceTree(items[0]).trace_id == trace_id(parse_trace(trace.to_json()))
    assert trace_id(trace) != trace_id(Trace({**trace.data, "seed": 2}))
    assert len({trace_id(item.trace) for item in items}) == 6
    assert of() != of(of={4: {"logprobs": [-2.0]}})  # another image, it may be
    assert of() != of(config={"scorer": "vote"})
    assert of(config={"cutoff": float("-inf")}) == of(config={"cutoff": "-inf"})
    assert TraceTree(Item(trace, "a.png", id="mine")).trace_id == "mine"


@pytest.mark.parametrize("name", FORMATS)
def test_a_trace_without_its_question(text_form, name):
    with pytest.raises(ValueError, match=r"question of trace '\w{24}' must be a string, got None"):
        rows_of(name, one(two_stages(question=None)), text_form)


@pytest.mark.parametrize("name", FORMATS)
def test_a_failed_search_has_no_answer_but_candidates(text_form, name):
    failed = one(two_stages(answer=None, error={"type": "RuntimeError", "message": "lost"}))
    assert rows_of(name, failed, text_form) == ([] if name == "sft" else rows_of(name, one(two_stages()), text_form))


def test_other_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match=r"must come with gold or is_right for by='answers', got neither"):
        list(to_groups(one(two_stages(), gold=None), by="answers"))
    with pytest.raises(ValueError, match="by must be 'score' or 'answers', got 'luck'"):
        list(to_preferences(one(two_stages()), MESSAGES, by="luck"))
    with pytest.raises(ValueError, match=r"image of trace '.*' must be a path or another string, got ''"):
        list(to_sft([Item(parse_trace(two_stages()), "")]))
    with pytest.raises(ValueError, match=r"search of trace '.*' must sample by its settings, got 'greedy'"):
        list(to_groups(one(two_stages(config={}, search="greedy"))))
    with pytest.raises(ValueError, match="min_margin must be >= 0, got -1"):
        list(to_preferences([], MESSAGES, min_margin=-1))
    with pytest.raises(TypeError, match=r"trace must be a Trace, got dict; parse_trace\(...\) makes one"):
        list(to_sft([Item(two_stages(), "a.png")]))


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("old\n")
    with pytest.raises(ValueError):
        write_jsonl(chain([{"a": 1}], [{"a": float("nan")}]), path)
    assert path.read_text() == "old\n" and [*tmp_path.iterdir()] == [path]
    assert write_jsonl(iter([{"a": "ü"}]), path) == 1 and path.read_text("utf-8") == '{"a": "ü"}\n'


def test_rows_come_one_trace_at_a_time():
    def endless():
        while True:
            yield from one(two_stages())

    assert next(to_sft(endless()))["nodes"] == [1, 3]


def write_items(path, items):
    lines = [{"trace": json.loads(item.trace.to_json()), "image": item.image, "gold": item.gold} for item in items]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


@pytest.mark.parametrize("name", FORMATS)
def test_export_of_a_file(items, text_form, tmp_path, name):
    traces, out = tmp_path / "traces.jsonl", tmp_path / "rows.jsonl"
    write_items(traces, items)
    count = export_file(traces, out, name)
    rows = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert rows == rows_of(name, items, text_form) and count == len(rows)


def test_export_from_the_shell(items, tmp_path, monkeypatch, capsys):
    traces, out = tmp_path / "traces.jsonl", tmp_path / "rows.jsonl"
    write_items(traces, items)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["llava-cot", "export", str(traces), str(out), *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, *capsys.readouterr()

    status, printed, _ = run("--format", "groups", "--by", "answers")
    assert status == 0 and printed == f"{len([*to_groups(items, by='answers')])} rows\n"
    assert run("--format", "preferences", "--min-margin", "0.005", "--model", "tiny")[0] == 0
    status, _, err = run("--format", "steps", "--min-margin", "1")
    assert status == 2 and err.startswith("error: min_margin is not supported by format='steps'")


def test_what_can_not_be_exported(tmp_path):
    traces, out = tmp_path / "traces.jsonl", tmp_path / "rows.jsonl"
    traces.write_text('\n{"trace": \n')
    with pytest.raises(ValueError, match=r"traces.jsonl, line 2: not JSON, column 10"):
        [*read_items(traces)]
    traces.write_text(json.dumps({"trace": two_stages(), "gold": "4"}) + "\n")
    with pytest.raises(ValueError, match=r"traces.jsonl, line 1: image must be given beside the trace, got none"):
        export_file(traces, out, "sft")
    traces.write_text(json.dumps({"trace": two_stages(model=""), "image": "a.png"}) + "\n")
    with pytest.raises(ValueError, match=r"model must name the processor that renders text"):
        export_file(traces, out, "preferences")
    with pytest.raises(ValueError, match=r"format must be one of \['sft', .*\], got 'dpo'"):
        export_file(traces, out, "dpo")
    with pytest.raises(ValueError, match="by is not supported by format='sft'"):
        export_file(traces, out, "sft", by="answers")
    traces.write_text("")
    assert export_file(traces, out, "preferences") == 0 and out.read_text() == ""


def test_an_export_never_replaces_its_traces(items, tmp_path):
    path = tmp_path / "traces.jsonl"
    write_jsonl([{"trace": json.loads(items[0].trace.to_json()), "image": "a.png"}], path)
    before = path.read_bytes()
    (tmp_path / "link.jsonl").symlink_to(path)
    for out in (path, tmp_path / "link.jsonl"):
        with pytest.raises(ValueError, match="out must be another file than traces"):
            export_file(path, out, "steps")
    with pytest.raises(ValueError, match="out must not be in traces"):
        export_file(tmp_path, tmp_path / "rows.jsonl", "steps")
    with pytest.raises(ValueError, match="out must be a file in a folder that exists"):
        export_file(path, tmp_path, "steps")
    assert path.read_bytes() == before
