"""The page of a run: what it shows, that no text is markup, that it loads nothing, and that a browser runs it."""

import re
from dataclasses import replace
from importlib.resources import files

import pytest
from helpers.page import Page, ask, needs_browser
from helpers.runs import Letters, protocol_of, result, scored, write_run
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_cot.evaluate.pages.plot import Point, plot
from llava_cot.evaluate.pages.report import ROWS, to_html, token_points
from llava_cot.evaluate.result import Scored
from llava_cot.evaluate.summary import summarise

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)> & 'quoted' \"too\""
SCORES = [1.0, 0.0, None, "failed", 0.5, 1.0]


def page_of(rows, traces=None, **protocol):
    return to_html(summarise(Letters(), rows, protocol_of(Letters(), **protocol)), rows, traces)


def test_it_shows_the_headline_the_protocol_and_every_answer():
    text = Page(page_of(scored(Letters(), SCORES))).text
    assert "Letters · tiny · greedy" in text and "settings.max_new_tokens200" in text and "rulescompat" in text
    assert "accuracy41.7% (" in text and "right2.5 of 6" in text
    assert "bounds41.7% to 75.0%: if no answer without a verdict was right, or if all were" in text
    assert "no verdict1 unparsed, 1 failed" in text
    for part in (
        "✓ right",
        "✗ wrong",
        "? unparsed",
        "✗ failed",
        "◐ 0.5",
        "out of <memory>",
        "even / fours",
        "Accuracy by length",
    ):
        assert part in text
    assert "A. one <b>" in text and "<SUMMARY>Say a letter.</SUMMARY>" in text


def test_nothing_is_markup_and_nothing_is_loaded():
    question = replace(
        Letters().question(0),
        text=HOSTILE,
        answer=HOSTILE,
        hint=HOSTILE,
        choices={HOSTILE: HOSTILE},
        category=(HOSTILE,),
    )
    hostile = {"text": HOSTILE, "conclusion": HOSTILE, "extracted": HOSTILE, "rule": HOSTILE, "outcome": "unclosed"}
    rows = [Scored(question, result(0, 0.0, **hostile)), Scored(question, result(0, "failed", 1))]
    page = page_of(
        [Scored(s.question, replace(s.result, error=HOSTILE)) for s in rows], model=HOSTILE, settings={HOSTILE: HOSTILE}
    )
    parsed = Page(page)
    assert not parsed.open and "img" not in parsed.names and parsed.names.count("script") == 1
    assert parsed.scripts == [
        "".join(files("llava_cot.report").joinpath(name).read_text("utf-8") for name in ("nav.js", "index.js"))
    ]
    assert parsed.text.count(HOSTILE) > 8
    assert not any(name.startswith("on") for _, attributes in parsed.elements for name in attributes)
    assert "default-src 'none'" in page and "url(" not in page and "@import" not in page


words = st.one_of(
    st.text(st.characters(), max_size=30), st.sampled_from([HOSTILE, "javascript:x", '"><b>', "\ud83d", "\0", "]]>"])
)


@settings(max_examples=40, deadline=None)
@given(st.lists(words, min_size=8, max_size=8))
def test_no_text_becomes_markup(texts):
    text, conclusion, extracted, rule, asked, gold, category, id = texts
    question = replace(Letters().question(0), id=id, text=asked, answer=gold, category=(category,))
    answer = result(0, 0.0, id=id, text=text, conclusion=conclusion, extracted=extracted, rule=rule)
    parsed, plain = Page(page_of([Scored(question, answer)])), Page(page_of(scored(Letters(), [0.0])))
    assert not parsed.open and parsed.scripts == plain.scripts and set(parsed.names) <= {*plain.names, "mark"}
    assert not any("href" in attributes for _, attributes in parsed.elements)
    page_of([Scored(question, answer)]).encode()


def test_answers_link_to_their_traces(tmp_path):
    rows = [Scored(Letters().question(0), result(0, 0.0, id=id)) for id in ("q0", "a/b?", "none")]
    folder = write_run(tmp_path / "run", Letters(), rows[:0])
    (folder / "traces").mkdir()
    (folder / "traces" / "q0.json").touch()
    (folder / "traces" / "q0.html").touch()
    (folder / "traces" / "a%2Fb%3F.json").touch()
    links = [a["href"] for _, a in Page(page_of(rows, folder / "traces")).elements if "href" in a]
    assert links == ["traces/q0.html", "traces/a%252Fb%253F.json"]


def test_a_large_run_shows_what_is_not_right_first():
    one = scored(Letters(), [1.0, 0.0])
    rows = [
        Scored(replace(s.question, id=f"r{n}"), replace(s.result, id=f"r{n}"))
        for n, s in ((n, one[n > ROWS + 5]) for n in range(ROWS + 9))
    ]
    page = page_of(rows)
    assert page.count("<tr class=") == ROWS and page.count('<tr class="wrong"') == 3
    assert "9 more answers" in Page(page).text


def test_points_are_equal_parts_by_length():
    rows = scored(Letters(), [1.0] * 20 + [0.0] * 20)
    points = token_points(rows)
    assert len(points) == 8 and [point.accuracy for point in points] == [1.0] * 4 + [0.0] * 4
    assert points[0].tokens == 102 and points[0].title == "100 to 104 tokens: 100.0% of 5 right"
    assert token_points(scored(Letters(), ["failed"])) == [] and len(token_points(rows[:3])) == 3


@pytest.mark.parametrize("tokens", [[5.0], [0.0, 0.0], [80, 160, 1280], [1, 1e6], [100, 101]])
def test_points_stand_in_the_frame(tokens):
    drawn = plot([Point(t, 0.5 + n / 100, 0.4, 0.7, "<title>", "<name>") for n, t in enumerate(tokens)], joined=True)
    places = [float(place) for place in re.findall(r'c?x[12]?="(-?[\d.]+)%', drawn)]
    assert places and all(5 <= place <= 97 for place in places)
    assert not re.search("nan|inf", drawn) and "<name>" not in drawn and not Page(drawn).open
    assert plot([]) == ""


SHOWN = """
const shown = () => [...document.querySelectorAll(".index tbody tr")].filter((row) => row.checkVisibility())
  .map((row) => row.cells[1].textContent);
const found = {};
for (const button of document.querySelectorAll("nav button")) {
  button.click();
  found[button.textContent] = shown();
}
document.querySelector("nav button").click();
const sort = (name) => [...document.querySelectorAll(".index th button")].find((b) => b.textContent === name).click();
sort("tokens");
found.tokens = shown();
const press = (key) => document.activeElement.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
document.activeElement.blur();
press("j");
press("Enter");
found.open = document.activeElement.querySelector("details").open;
found.wide = document.documentElement.scrollWidth - innerWidth;
return found;
"""


@needs_browser
@pytest.mark.parametrize("size", ["1400,1000", "420,900"])
def test_a_browser_filters_sorts_and_unfolds(tmp_path, size):
    file = tmp_path / "page.html"
    file.write_text(page_of(scored(Letters(), SCORES), model="a-long-name/" * 9), encoding="utf-8")
    found = ask(file, SHOWN, f"--window-size={size}")
    assert found["all (6)"] == [f"q{n}" for n in range(6)]
    assert found["right (2)"] == ["q0", "q5"] and found["wrong (1)"] == ["q1"] and found["partly (1)"] == ["q4"]
    assert found["unparsed (1)"] == ["q2"] and found["failed (1)"] == ["q3"]
    assert found["tokens"] == ["q5", "q4", "q2", "q1", "q0", "q3"]
    assert found["open"] and found["wide"] <= 0
