"""The stage grammar: whatever a model writes, parsing it tells what is there."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_cot.stages import STAGES, Outcome, parse, render

TAGS = [tag for stage in STAGES for tag in (stage.open_tag, stage.close_tag)]
plain_text = st.text().filter(lambda text: not any(tag in text for tag in TAGS))
tag_soup = st.lists(st.sampled_from([*TAGS, "<", "</", ">", "SUMMARY", " ", "\n\n", "3", "é"]), max_size=30).map(
    "".join
)


@pytest.mark.parametrize(
    "text, outcome, content",
    [
        ("<CAPTION> a cat </CAPTION>", Outcome.COMPLETE, "a cat"),
        ("<CAPTION></CAPTION>", Outcome.COMPLETE, ""),
        ("<CAPTION>\n\na cat, and then noth", Outcome.UNCLOSED, "a cat, and then noth"),
        ("<CAPTION> a cat <REASONING> it is grey </REASONING>", Outcome.UNCLOSED, "a cat"),
        ("a cat </CAPTION>", Outcome.MISSING, ""),
        ("</CAPTION> a cat <CAPTION", Outcome.MISSING, ""),
        ("<CAPTION> a cat </CAPTION> <CAPTION> a dog </CAPTION>", Outcome.REPEATED, "a cat"),
        ("<CAPTION> a cat <CAPTION> a dog </CAPTION>", Outcome.REPEATED, "a cat"),
        ("<CAPTION> a cat <CAPTION> a dog", Outcome.REPEATED, "a cat"),
    ],
)
def test_outcomes(text, outcome, content):
    stage = parse(text)["CAPTION"]
    assert (stage.outcome, stage.text) == (outcome, content)


@given(tag_soup | st.text())
def test_any_text_parses(text):
    stages = parse(text)
    assert list(stages) == ["SUMMARY", "CAPTION", "REASONING", "CONCLUSION"]
    for stage in stages.values():
        assert stage.text in text and stage.text == stage.text.strip()
        assert stage.stage.open_tag not in stage.text and stage.stage.close_tag not in stage.text
        assert (stage.outcome is Outcome.MISSING) == (stage.stage.open_tag not in text)
        assert (stage.outcome is Outcome.REPEATED) == (text.count(stage.stage.open_tag) > 1)


@given(st.fixed_dictionaries({stage.value: plain_text for stage in STAGES}))
def test_what_was_rendered_is_parsed(contents):
    stages = parse(render(contents))
    assert {name: stage.text for name, stage in stages.items()} == {n: text.strip() for n, text in contents.items()}
    assert {stage.outcome for stage in stages.values()} == {Outcome.COMPLETE}
