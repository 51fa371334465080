"""The page: what it shows, that nothing a model wrote is markup, and that a browser runs it."""

import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from importlib.resources import files

import pytest
from helpers.scripted import Draft, play
from helpers.traces import HOSTILE, LONG, trace_of, two_retraces
from PIL import Image

from llava_cot.report import text
from llava_cot.report.html import to_html
from llava_cot.search import BestOfNConfig, SwiresConfig
from llava_cot.search.best_of_n import best_of_n
from llava_cot.search.swires import swires

VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Elements by name with their attributes, the text of each card, and all text outside script and style."""

    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.elements, self.cards, self.text, self.scripts, self.open, self._card = [], {}, "", [], [], None
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "article":
            self._card = dict(attributes)["id"]
            self.cards[self._card] = ""

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag == "article":
            self._card = None

    def handle_data(self, data):
        if "script" in self.open:
            self.scripts.append(data)
        elif "style" not in self.open:
            self.text += data
            if self._card:
                self.cards[self._card] += data


@pytest.fixture(scope="module")
def trace():
    return two_retraces()


@pytest.fixture(scope="module")
def page(trace):
    return to_html(trace.data, image=Image.new("RGB", (32, 32), "red"), gold="9 & 10")


def test_it_shows_both_retraces_and_why(page):
    parsed = Page(page)
    for reason in (
        "↩ REASONING failed in round 1: back to CAPTION, round 2"
        "the second best score −0.400 (the best is 0.700) is not above the cutoff 0.500",
        "↩ CAPTION failed in round 2: back to CAPTION, round 3"
        "the second best score 0.000 (the best is 0.000) is not above the cutoff 0.500",
    ):
        assert reason in parsed.text
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
    assert parsed.text.count("⤴ carried over into this pool: ") == 2  # of captions and of reasonings
    assert parsed.text.count("⤴ also in the pool of round 3") == 8
    assert "answer4 & 5gold9 & 10 ≠ not the same" in parsed.text


def test_what_a_model_wrote_is_never_markup(page):
    parsed = Page(page)
    assert not parsed.open  # everything of ours is closed, and nothing else was opened
    assert parsed.scripts == [files("llava_cot.report").joinpath("page.js").read_text("utf-8")]
    assert sum(tag in ("img", "script") for tag, _ in parsed.elements) == 2  # ours
    assert HOSTILE in parsed.text and "<end>" in parsed.text
    assert not any(name.startswith("on") for _, attributes in parsed.elements for name in attributes)


def test_it_loads_nothing(page):
    links = [a.get("src") or a.get("href") for _, a in Page(page).elements if "src" in a or "href" in a]
    assert links and all(re.match(r"#n\d+$|data:image/png;base64,", link) for link in links)
    assert "default-src 'none'" in page and "url(" not in page and "@import" not in page


def test_it_is_a_pure_function_and_json_is_the_same_trace(trace, page):
    assert to_html(trace.data) == to_html(trace.data) == to_html(json.loads(trace.to_json()))
    assert len(page.encode()) < 1_000_000


def test_a_photo_stays_small(trace):
    noise = Image.effect_noise((2000, 1500), 100).convert("RGBA")
    assert len(to_html(trace.data, image=noise)) < 1_000_000


@pytest.mark.parametrize("worst", [-math.inf, math.nan])
def test_infinities_go_through_json(worst):
    script = lambda stage, round, parent, index: Draft(worst if index else 1.0)  # noqa: E731
    trace = trace_of(play(swires, lambda scorer: SwiresConfig(scorer=scorer, cutoff=math.inf), script))
    page = to_html(json.loads(trace.to_json()))
    assert page == to_html(trace.data) and "−∞" in page and "cutoff ∞" in page


def test_whole_answers_have_a_column_of_their_own():
    played = play(best_of_n, lambda scorer: BestOfNConfig(scorer=scorer), lambda *place: Draft(text="just <this>"))
    page = Page(to_html(trace_of(played, "best_of_n", None).data, question="Why?"))
    assert "ANSWERS" in page.text and "just <this>" in page.text and "Why?" in page.text


def test_half_characters_are_no_error(trace):
    to_html(trace.data, gold="\ud83d").encode()


def test_words_that_the_kept_sibling_has_not():
    html = text.to_html("<CAPTION> one red cube </CAPTION>", "<CAPTION> one blue cube </CAPTION>")
    assert html == (
        '<div class="text"><span>&lt;CAPTION&gt;</span> one <mark>red</mark> cube <span>&lt;/CAPTION&gt;</span></div>'
    )
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
    assert attributes["srcdoc"] == to_html(trace.data) == trace.to_html()


def browse(page, folder):
    """The page's elements once a browser has run it."""
    file = folder / "page.html"
    file.write_text(page, encoding="utf-8")
    options = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --dump-dom"
    )
    command = ["chromium", *options.split(), f"--user-data-dir={folder / 'profile'}", file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium")
def test_a_browser_runs_it(page, tmp_path):
    dom = browse(page, tmp_path)
    cards, rounds = page.count("<article"), 3
    for name in (f"all ({cards})", "winner path (4)", *(f"round {n} (" for n in range(1, rounds + 1))):
        assert f'">{name}' in dom  # buttons that only the page's script makes
    assert 'aria-pressed="true">all' in dom


PRESSES = """<script>
const press = (key) => document.body.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
const here = () => document.activeElement.id;
const seen = [];
for (const key of ["j", "j", "k", "ArrowRight", "ArrowRight", "ArrowLeft", "f", "f", "j", "ArrowDown"]) {
  press(key);
  seen.push(here());
}
document.title = seen.join() + " " + document.querySelector("[aria-pressed=true]").textContent;
</script></body>"""


@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium")
def test_keys_move_between_cards_and_filter(page, tmp_path):
    assert "<title>How many?" in browse(page.replace("</body>", PRESSES), tmp_path)  # a script that is not ours
    unlocked = page.replace('http-equiv="Content-Security-Policy"', 'name="none"').replace("</body>", PRESSES)
    title = re.search("<title>(.*?)</title>", browse(unlocked, tmp_path)).group(1)
    assert title == "n1,n2,n1,n2,n6,n2,n2,n2,n6,n23 winner path (4)"
