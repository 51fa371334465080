"""The page: what it shows, that nothing a model wrote is markup, and that a browser runs it."""

import json
import math
import re
from importlib.resources import files

import numpy as np
import pytest
from helpers.page import Page, ask, browse, needs_browser
from helpers.scripted import Draft, play
from helpers.traces import HOSTILE, LONG, failed, loop, run, sentences, spent, trace_of, two_retraces
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from llava_cot.report import text
from llava_cot.report.html import to_html
from llava_cot.report.tree import to_tree
from llava_cot.report.view import read
from llava_cot.search import BestOfNConfig, SwiresConfig
from llava_cot.search.best_of_n import best_of_n
from llava_cot.search.swires import swires
from llava_cot.trace import parse_trace

REASONS = (
    "↩ REASONING failed in round 1: back to CAPTION, round 2",
    "the second best score −0.400 (the best is 0.700) is not above the cutoff 0.500",
    "↩ CAPTION failed in round 2: back to CAPTION, round 3",
    "the second best score 0.000 (the best is 0.000) is not above the cutoff 0.500",
)
SCRIPTS = [files("llava_cot.report").joinpath(name).read_text("utf-8") for name in ("nav.js", "trace.js")]


@pytest.fixture(scope="module")
def trace():
    return two_retraces()


@pytest.fixture(scope="module")
def page(trace):
    return to_html(trace, image=Image.new("RGB", (32, 32), "red"), gold="9 & 10")


def test_it_shows_both_retraces_and_why(page):
    parsed = Page(page)
    assert REASONS[0] + REASONS[1] in parsed.text and REASONS[2] + REASONS[3] in parsed.text
    assert sum(tag == "svg" and a.get("class") == "arrow" for tag, a in parsed.elements) == 2


def test_it_shows_every_candidate_and_what_became_of_it(page, trace):
    parsed = Page(page)
    cards = {a["id"]: a for tag, a in parsed.elements if tag == "article"}
    assert len(cards) == len(trace.data["nodes"])
    states = {"winner": 0, "kept": 0, "pruned": 0}
    for node in trace.data["nodes"]:
        card, shown = cards[f"n{node['id']}"], parsed.cards[f"n{node['id']}"]
        states[card["data-state"]] += 1
        assert (card["data-state"] == "pruned") == (not node["kept"])
        assert f"seed {node['seed']}" in shown and f"{len(node['tokens'])} token" in shown
        assert re.sub(r"… [\d,]+ more characters", "", shown).find(node["text"].strip()) > 0
    assert states["winner"] == 4 and states["kept"] > 0 and states["pruned"] > 0
    assert parsed.text.count("⤴ carried over into this pool from round ") == 2  # of captions and of reasonings
    assert parsed.text.count("⤴ also in the pool of round 3") == 8
    assert "answer4 & 5gold9 & 10 ≠ not the same" in parsed.text


def test_what_a_model_wrote_is_never_markup(page):
    parsed = Page(page)
    assert not parsed.open  # everything of ours is closed, and nothing else was opened
    assert parsed.scripts == ["".join(SCRIPTS)]
    assert sum(tag in ("img", "script") for tag, _ in parsed.elements) == 2  # ours
    assert HOSTILE in parsed.text and "<end>" in parsed.text
    assert not any(name.startswith("on") for _, attributes in parsed.elements for name in attributes)


def test_it_loads_nothing(page):
    links = [a.get("src") or a.get("href") for _, a in Page(page).elements if "src" in a or "href" in a]
    assert links and all(re.match(r"#n\d+$|data:image/png;base64,", link) for link in links)
    assert "default-src 'none'" in page and "url(" not in page and "@import" not in page


def test_it_is_a_pure_function_and_json_is_the_same_trace(trace, page):
    assert to_html(trace) == to_html(trace) == to_html(parse_trace(trace.to_json()))
    assert len(page.encode()) < 1_000_000


def test_a_photo_stays_small(trace):
    noise = Image.effect_noise((2000, 1500), 100).convert("RGBA")
    assert len(to_html(trace, image=noise)) < 1_000_000


@pytest.mark.parametrize("worst", [-math.inf, math.nan])
def test_infinities_go_through_json(worst):
    script = lambda stage, round, parent, index: Draft(worst if index else 1.0)  # noqa: E731
    trace = trace_of(play(swires, lambda scorer: SwiresConfig(scorer=scorer, cutoff=math.inf), script))
    page = to_html(parse_trace(trace.to_json()))
    assert page == to_html(trace) and "−∞" in page and "cutoff ∞" in page


def test_whole_answers_have_a_column_of_their_own():
    played = play(best_of_n, lambda scorer: BestOfNConfig(scorer=scorer), lambda *place: Draft(text="just <this>"))
    page = Page(to_html(trace_of(played, "best_of_n", None), question="Why?"))
    assert "ANSWERS" in page.text and "just <this>" in page.text and "Why?" in page.text


def test_half_characters_are_no_error(trace):
    to_html(trace, gold="\ud83d").encode()


def test_words_that_the_kept_sibling_has_not():
    tags = "<CAPTION>", "</CAPTION>"
    html = text.to_html("<CAPTION> one red cube </CAPTION>", "<CAPTION> one blue cube </CAPTION>", tags)
    assert html == (
        '<div class="text"><span>&lt;CAPTION&gt;</span> one <mark>red</mark> cube <span>&lt;/CAPTION&gt;</span></div>'
    )
    assert "a <mark>b c</mark> d" in text.to_html("a b c d", "a d")
    assert "<mark>b</mark><span>!</span><mark>c</mark>" in text.to_html("b!c", "d", ["!"])
    assert "<mark>" not in text.to_html("a b", None) and "<mark>" not in text.to_html("a b", "a b c")


@pytest.mark.parametrize("written", [LONG, "x" * 10_000, "é<" * 5_000, " " * 3 + "a\n" * 5_000])
def test_long_text_is_folded_and_whole(written):
    page = Page(text.to_html(written, written[::-1]))
    assert re.sub(r"… [\d,]+ more characters", "", page.text) == written.strip()
    assert page.elements[0][0] == "details"


def test_a_notebook_shows_it_in_a_frame(trace):
    frame = Page(trace._repr_html_())
    ((tag, attributes),) = frame.elements
    assert tag == "iframe" and attributes["sandbox"] == "allow-scripts"
    assert attributes["srcdoc"] == to_html(trace) == trace.to_html()


def test_another_grammar_has_its_own_columns_tags_and_conclusion():
    trace = loop()
    page = to_html(trace, gold="0.0")
    parsed = Page(page)
    for part in ("PLAN · step 1", "LOOK · step 2", "PLAN · step 3", "SAY · step 4", "answer0gold0.0 ✓ the same"):
        assert part in parsed.text
    assert "<span>&lt;|plan|&gt;</span> say 0 <span>&lt;|/plan|&gt;</span>" in page
    assert "<span>So the answer is</span> 1<span>!</span>" in page
    assert "↩ PLAN · step 3 failed in round 1: back to PLAN · step 3, round 2" in parsed.text
    assert "answer 21 #18, score 1.000" in parsed.text and "answer 2" in parsed.cards["n18"]
    assert "✗ unclosed" in parsed.cards["n7"] and "✗ after PLAN comes LOOK or SAY, got <|/plan|>" in parsed.cards["n7"]
    assert "⚠ no score: the score is nan" in parsed.cards["n12"]


def test_a_spent_budget_is_shown_with_what_was_finished_greedily():
    parsed = Page(to_html(spent()))
    assert parsed.text.count("scorer calls: 8 of 10; #13 is what was finished greedily") == 2  # in the head and below
    assert "FINISHED GREEDILY" in parsed.text and "★ winner" in parsed.cards["n13"]


def test_a_failed_search_is_shown_as_far_as_it_came():
    trace = failed()
    parsed = Page(to_html(trace, gold="4"))
    assert f"failed✗ RuntimeError: out of memory {HOSTILE}" in parsed.text and "gold4" in parsed.text
    assert "the same" not in parsed.text and "malformed" not in parsed.text
    assert "winner" not in "".join(parsed.cards.values())
    assert len(parsed.cards) == len(trace.data["nodes"]) == 12 and not parsed.open
    assert parsed.scripts == ["".join(SCRIPTS)] and sum(tag in ("img", "script") for tag, _ in parsed.elements) == 1
    assert "⚠ no score: RuntimeError" in parsed.cards[f"n{trace.data['nodes'][-1]['id']}"]
    started = parse_trace(json.loads(trace.to_json()) | {"nodes": [], "events": []})
    assert "failed✗ RuntimeError" in Page(to_html(started)).text  # before it drew anything


def test_sentences_stand_side_by_side_in_one_column():
    page = to_html(sentences())
    assert 'class="board only"' in page and "PARTS OF ANSWERS" in page and page.count("<h3") == 7
    assert "★ winner, kept in round 7" in page and "⤴ also in the pool of round 3, 4, 5, 6, 7" in page


def test_what_a_scorer_tells_is_a_fact():
    data = json.loads(two_retraces().to_json())
    data["nodes"][1]["notes"] = {"<b>judge": 0.25, "confidence": "-inf"}
    assert "scores: <b>judge 0.250 · confidence −∞" in Page(to_html(parse_trace(data))).cards["n2"]


def test_many_long_candidates_stay_small():
    def script(stage, round, parent, index):
        return Draft(1.0 if index == 50 else 0.0, text="<&>'\" 🎉 </script>" * 600 if index == 7 else f"short {index}")

    played = run(best_of_n, lambda scorer: BestOfNConfig(scorer=scorer, n=100), script)
    page = to_html(trace_of(played, "best_of_n"))
    assert len(page.encode()) < 1_000_000 and len(Page(page).cards) == 100


NASTY = [
    "</script>",
    "<script>",
    "<!--",
    "-->",
    "]]>",
    "</style>",
    "</details>",
    "<p",
    "&amp;",
    "&#0;",
    "\0",
    "\x1b[2J",
]
NASTY += [
    "\ud83d",
    "👩‍🚀",
    "\u202e",
    "\u2028",
    "javascript:x",
    '" onload="x',
    "' x='",
    "\ufffe",
    "<![CDATA[",
    "<svg/onload=x>",
]
words = st.lists(st.one_of(st.sampled_from(NASTY), st.text(st.characters(), max_size=20)), max_size=8).map("".join)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_no_text_becomes_markup(data):
    """Whatever stands in it, the page has the same elements, its one script, and nothing that a file can't hold."""
    trace = json.loads(loop().to_json())
    draw = lambda: data.draw(words)  # noqa: E731
    trace["question"], trace["search"] = draw(), draw()
    for node in data.draw(st.lists(st.sampled_from(trace["nodes"]), min_size=1, max_size=3)):
        node |= {"text": draw(), "violation": draw(), "error": draw(), "notes": {draw(): 1.0}, "finish": draw()}
    tags = data.draw(st.lists(words.filter(bool), min_size=6, max_size=6, unique=True))
    names = trace["grammar"]["tags"]
    trace["grammar"]["tags"] = {name: tags[2 * at : 2 * at + 2] for at, name in enumerate(names)}
    for event in trace["events"]:
        if event["event"] == "retraced":
            event |= {"stage": draw(), "to": draw(), "reason": draw()}
    read = parse_trace(trace)
    page = to_html(read, gold=draw())
    parsed = Page(page)
    assert not parsed.open and parsed.scripts == ["".join(SCRIPTS)] and "img" not in parsed.names
    assert set(parsed.names) <= set(Page(to_html(two_retraces(), gold="")).names) | {"details", "summary", "mark"}
    assert not any(name.startswith("on") for _, attributes in parsed.elements for name in attributes)
    links = [attributes["href"] for tag, attributes in parsed.elements if tag == "a"]
    assert all(re.fullmatch(r"#n\d+", link) for link in links)
    page.encode()
    assert not re.search("[\0-\x08\x0b-\x1f\x7f-\x9f\ufffe\uffff]", page)
    to_tree(read)


@needs_browser
def test_a_browser_runs_it(page, tmp_path):
    file = tmp_path / "page.html"
    file.write_text(page, encoding="utf-8")
    dom = browse(file)
    cards, rounds = page.count("<article"), 3
    for name in (f"all ({cards})", "winner path (4)", *(f"round {n} (" for n in range(1, rounds + 1))):
        assert f'">{name}' in dom  # buttons that only the page's script makes
    assert 'aria-pressed="true">all' in dom
    file.write_text(page.replace("</body>", "<script>document.title = 'broken';</script></body>"), encoding="utf-8")
    assert "<title>How many?" in browse(file)  # a script that is not ours


SEEN = """
const middle = (box) => (box.left + box.right) / 2;
const isSeen = (part) => part.checkVisibility({ opacityProperty: true, visibilityProperty: true })
  && part.getBoundingClientRect().width > 0 && part.getBoundingClientRect().right <= innerWidth;
const columns = [...document.querySelectorAll(".head")].map((head) => middle(head.getBoundingClientRect()));
const columnAt = (x) => columns.findIndex((column) => Math.abs(column - x) < 10);
return [...document.querySelectorAll(".retrace")].map((retrace) => {
  const reason = retrace.querySelector("p"), lines = [...retrace.querySelectorAll("line")];
  const [down, , into] = lines.map((line) => line.getBoundingClientRect());
  const head = retrace.querySelector("path");
  const box = reason.getBoundingClientRect(), band = retrace.getBoundingClientRect();
  const style = getComputedStyle(reason), stroke = getComputedStyle(lines[0]).stroke;
  return {
    text: reason.innerText.split("\\n"),
    seen: isSeen(reason) && lines.every((line) => line.checkVisibility()) && box.top >= band.top
      && box.bottom <= band.bottom && head.getBoundingClientRect().width > 10,
    start: columnAt(middle(down)), end: columnAt(middle(into)), head: columnAt(middle(head.getBoundingClientRect())),
    colors: [style.color, getComputedStyle(document.body).backgroundColor, stroke],
  };
});
"""


@needs_browser
@pytest.mark.parametrize("is_dark", [False, True])
def test_both_arrows_and_their_reasons_are_seen(page, tmp_path, is_dark):
    file = tmp_path / "page.html"
    file.write_text(page, encoding="utf-8")
    assert file.stat().st_size < 1_000_000
    first, second = ask(file, SEEN, f"--blink-settings=preferredColorScheme={0 if is_dark else 1}")
    assert first["seen"] and first["text"] == list(REASONS[:2])
    assert second["seen"] and second["text"] == list(REASONS[2:])
    headings = read(two_retraces()).headings
    assert [headings[first[part]] for part in ("start", "end", "head")] == ["REASONING", "CAPTION", "CAPTION"]
    assert [headings[second[part]] for part in ("start", "end", "head")] == ["CAPTION"] * 3
    ink, paper, arrow = (sum(map(int, re.findall(r"\d+", color)[:3])) for color in first["colors"])
    assert (ink > paper) == is_dark and abs(ink - paper) > 400 and abs(arrow - paper) > 200


PRESSES = """
const press = (key) => document.body.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
const seen = [];
for (const key of ["j", "j", "k", "ArrowRight", "ArrowRight", "ArrowLeft", "f", "f", "j", "ArrowDown"]) {
  press(key);
  seen.push(document.activeElement.id);
}
return [seen, document.querySelector("[aria-pressed=true]").textContent];
"""


@needs_browser
def test_keys_move_between_cards_and_filter(page, tmp_path):
    file = tmp_path / "page.html"
    file.write_text(page, encoding="utf-8")
    moves = ["n1", "n2", "n1", "n2", "n6", "n2", "n2", "n2", "n6", "n23"]
    assert ask(file, PRESSES) == [moves, "winner path (4)"]


def test_an_image_in_every_form(trace, tmp_path):
    picture = Image.new("RGB", (8, 8), "red")
    picture.save(tmp_path / "a.png")
    expected = to_html(trace, image=picture)
    for image in (tmp_path / "a.png", str(tmp_path / "a.png"), [picture], np.asarray(picture)):
        assert to_html(trace, image=image) == expected
    assert to_html(trace, image=[picture, picture]).count("data:image/") == 2 and "data:image/" not in to_html(trace)
    with pytest.raises(TypeError, match="gold must be a string or None, got 4"):
        to_html(trace, gold=4)
    with pytest.raises(TypeError, match="question must be a string or None, got"):
        to_html(trace, question=b"?")
