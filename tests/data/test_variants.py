"""The ablation's variants: each keeps what it says, and all are conversations."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_cot.data.conversations import parse_conversation
from llava_cot.data.variants import DESCRIBE, VARIANTS, convert, main
from llava_cot.data.world import world_row
from llava_cot.stages import LLAVA_COT, STAGES, render

words = st.text(st.characters(codec="utf-8", exclude_characters="<>"), min_size=1).filter(str.strip).map(str.strip)
stages = st.fixed_dictionaries({str(stage): words for stage in STAGES})
images = st.one_of(st.none(), words, st.lists(words, min_size=1, max_size=3))


@st.composite
def rows(draw):
    turns = draw(st.lists(st.tuples(words, stages), min_size=1, max_size=3))
    conversations = [
        turn
        for question, answer in turns
        for turn in ({"from": "human", "value": question}, {"from": "gpt", "value": render(answer)})
    ]
    row = {"id": draw(words), "conversations": conversations, "source": draw(words)}
    image = draw(images)
    return (row if image is None else {**row, "image": image}), turns


def texts(answer: str) -> dict[str, str]:
    return {name: stage.text for name, stage in LLAVA_COT.parse(answer).items() if stage.outcome == "complete"}


def order(answer: str) -> list[str]:
    found = {stage: answer.find(stage.open_tag) for stage in STAGES}
    return sorted((stage for stage in STAGES if found[stage] >= 0), key=lambda stage: found[stage])


@given(rows())
def test_all_are_conversations_on_the_same_images(given):
    row, turns = given
    before = json.dumps(row)
    for make in VARIANTS.values():
        made = make(row)
        parsed = [parse_conversation(new) for new in json.loads(json.dumps(made))]
        assert {c.images for c in parsed} <= {parse_conversation(row).images, ()}
        assert len({c.id for c in parsed}) == len(made) and parsed[0].id == row["id"]
        assert all(new["source"] == row["source"] and new.keys() | {"image"} == row.keys() | {"image"} for new in made)
        assert [turn.question for turn in parsed[0].turns] == [question for question, _ in turns]
        assert make(row) == made  # the same every time
    assert json.dumps(row) == before


@given(rows())
def test_what_each_keeps(given):
    row, turns = given

    def answers(variant, at=0):
        return [turn.answer for turn in parse_conversation(VARIANTS[variant](row)[at]).turns]

    assert VARIANTS["full"](row) == [row]
    for left in STAGES[:-1]:
        for answer, (_, given_stages) in zip(answers(f"without {left}"), turns):
            assert texts(answer) == {name: text for name, text in given_stages.items() if name != left}
            assert order(answer) == [stage for stage in STAGES if stage != left]
    for answer, (_, given_stages) in zip(answers("conclusion first"), turns):
        assert texts(answer) == given_stages and order(answer) == [STAGES[3], *STAGES[:3]]
    for answer, (_, given_stages) in zip(answers("shuffled order"), turns):
        assert texts(answer) == given_stages and order(answer)[-1] == "CONCLUSION"
    assert (
        answers("direct") == answers("direct with caption") == [given_stages["CONCLUSION"] for _, given_stages in turns]
    )
    assert answers("without tags") == [
        "\n\n".join(given_stages[stage] for stage in STAGES) for _, given_stages in turns
    ]
    if "image" in row:
        (turn,) = parse_conversation(VARIANTS["direct with caption"](row)[1]).turns
        assert (turn.question, turn.answer) == (DESCRIBE, turns[0][1]["CAPTION"])
    else:
        assert len(VARIANTS["direct with caption"](row)) == 1
    tasks = {new["id"].removeprefix(row["id"]): (new.get("image"), new) for new in VARIANTS["apart"](row)}
    captions = {"-caption"} if "image" in row else set()
    assert tasks.keys() == {"", "-summary", "-reasoning"} | captions
    for name, kept in (
        ("", row.get("image")),
        ("-caption", row.get("image")),
        ("-summary", None),
        ("-reasoning", None),
    ):
        assert name not in tasks or tasks[name][0] == kept
    (turn,) = parse_conversation(tasks["-reasoning"][1]).turns
    assert turn.answer == turns[0][1]["REASONING"] and turn.question == f"{turns[0][1]['CAPTION']} {turns[0][0]}"


def test_the_shuffle_gives_every_order_its_share():
    orders = [
        tuple(order(VARIANTS["shuffled order"](world_row(seed))[0]["conversations"][1]["value"])) for seed in range(600)
    ]
    counts = {found: orders.count(found) for found in set(orders)}
    assert len(counts) == 6 and min(counts.values()) > 65  # 100 each, give or take 9


def test_spaces_of_the_data_set_do_not_matter():
    row = world_row(3)
    tight = row["conversations"][1]["value"].replace("> ", ">").replace(" <", "<").replace("\n\n", "\n")
    loose = {**row, "conversations": [row["conversations"][0], {"from": "gpt", "value": f"\n{tight} "}]}
    for make in VARIANTS.values():
        made = make(row)
        assert [new["conversations"] for new in make(loose)] == [new["conversations"] for new in made]


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("</REASONING>", "", "conversations[1] must have the four stages: <CONCLUSION> opens inside REASONING"),
        ("<SUMMARY>", "<CAPTION>", "conversations[1] must have the four stages: first comes SUMMARY, got <CAPTION>"),
        (
            "<CONCLUSION> 5 ",
            "<CONCLUSION> ",
            "conversations[1] must have text in every stage, got none in ['CONCLUSION']",
        ),
    ],
)
def test_what_is_not_in_four_stages(tmp_path, old, new, message):
    row = world_row(0)
    bad = {
        **row,
        "conversations": [
            row["conversations"][0],
            {"from": "gpt", "value": row["conversations"][1]["value"].replace(old, new)},
        ],
    }
    for make in VARIANTS.values():
        with pytest.raises(ValueError) as raised:
            make(bad)
        assert str(raised.value) == message
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(f"{json.dumps(row)}\n\n{json.dumps(bad)}\n")
    target.write_text("as it was")
    with pytest.raises(ValueError) as raised:
        convert(source, target, "direct")
    assert str(raised.value) == f"row 3 of {str(source)!r}: {message}" and target.read_text() == "as it was"


def test_the_command(tmp_path, monkeypatch, capsys):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(world_row(seed)) + "\n" for seed in range(20)))
    monkeypatch.setattr("sys.argv", ["variants", str(source), str(target), "--variant", "direct with caption"])
    main()
    assert capsys.readouterr().out == f"40 rows in {target}\n" and len(target.read_text().splitlines()) == 40
    source.write_text("[1]\n")
    with pytest.raises(SystemExit):
        main()
    assert f"row 1 of {str(source)!r}: row must be an object, got int" in capsys.readouterr().err


def test_an_unknown_variant(tmp_path):
    with pytest.raises(ValueError, match=r"variant must be one of \['full', .*\], got 'half'"):
        convert(tmp_path / "in.jsonl", tmp_path / "out.jsonl", "half")
