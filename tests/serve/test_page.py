"""The page at ``/``, driven in a browser, on a real server with a real engine."""

import json
import threading
import time
from itertools import pairwise

import httpx
import pytest
import uvicorn
from helpers.browser import DEADLINE, browsing
from helpers.page import needs_browser
from helpers.says import says

from llava_cot import EngineConfig, SwiresGenerator
from llava_cot.data import shapes
from llava_cot.search import POLICIES
from llava_cot.search.plan import PRESETS, settings_of
from llava_cot.serve.app import create_app
from llava_cot.trace import parse_trace

SAMPLE, SEED = shapes.sample(shapes.TEST_SEEDS[3]), 5  # CAPTION fails in two rounds
HOSTILE = "</script><script>run('script')</script><img src=x onerror=run('img')> \u202edlo\u202c <b>\u2028&amp;"
IDLE = "document.querySelector('#result').getAttribute('aria-busy') === 'false'"
# What each change of the result showed: cards, retraces, whether it was running, and the answer.
RECORD = """
window.seen = [];
new MutationObserver(() => seen.push([
  document.querySelectorAll('.card').length, document.querySelectorAll('.retrace').length,
  Boolean(document.querySelector('dd.running')), document.querySelector('dd.answer')?.innerText || null,
])).observe(document.querySelector('#result'), { childList: true });
"""


class Site:
    """A server in this process, so that a test can look into its engine."""

    def __init__(self, generator):
        self.generator = generator
        self.app = create_app(generator, name="tiny")
        self.server = uvicorn.Server(uvicorn.Config(self.app, port=0, log_level="warning"))
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        self.wait(lambda: self.server.started)
        self.origin = f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}"

    @staticmethod
    def wait(is_true):
        end = time.monotonic() + DEADLINE
        while not is_true():
            assert time.monotonic() < end
            time.sleep(0.01)

    def wait_until_nothing_is_held(self):
        engine, gate = self.generator.engine, self.app.state.gate
        self.wait(lambda: not (gate.in_flight or engine.pages_in_use or engine.images_in_use))

    def close(self):
        self.server.should_exit = True
        self.thread.join(DEADLINE)


@pytest.fixture(scope="module")
def site():
    site = Site(SwiresGenerator.from_pretrained("tiny", engine=EngineConfig(page_size=4)))
    yield site
    site.close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with browsing(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def tab(site, browser):
    """The page, with an empty history. Nothing that it does may violate its policy or leave its origin."""
    tab = browser.open(f"{site.origin}/")
    tab.wait("document.querySelector('#search').options.length")
    yield tab
    tab.assert_clean(site.origin)
    tab.ask("new Promise((done) => { indexedDB.deleteDatabase('llava-cot').onblocked = done; setTimeout(done, 0); })")
    browser.send("Target.closeTarget", targetId=tab.target)
    site.wait_until_nothing_is_held()


@pytest.fixture
def image(tmp_path):
    SAMPLE.image.save(tmp_path / "question.png")
    return tmp_path / "question.png"


def fill(tab, image=None, question=SAMPLE.question, **numbers):
    if image is not None:
        tab.choose("#files", image)
    tab.write("#question", question)
    for name, value in numbers.items():
        tab.write(f"#{name}", str(value))


def text(tab, selector):
    return tab.ask(f"document.querySelector({json.dumps(selector)}).innerText")


@needs_browser
def test_a_search_with_two_retraces_is_seen_live(site, tab, image, tmp_path):
    expected = site.generator.answer(SAMPLE.image, SAMPLE.question, seed=SEED)
    fill(tab, image, seed=SEED)
    tab.ask(RECORD)
    tab.press("Enter", 2)
    tab.wait(f"{IDLE} && document.querySelector('dd.answer')")
    seen = [row for row in tab.ask("seen") if row[0]]
    *live, last = seen
    assert last == [len(expected.trace.nodes), 2, False, expected.conclusion]
    assert [cards for cards, *_ in live] == sorted(cards for cards, *_ in live)
    assert {retraces for _, retraces, is_running, _ in live if is_running} == {0, 1, 2}
    assert all(answer is None for *_, is_running, answer in live if is_running)
    assert sum(is_running for *_, is_running, _ in live) >= 6  # a stage at a time
    assert text(tab, "#status") == f"Answered: {expected.conclusion}"

    texts = tab.ask("[...document.querySelectorAll('.card .text')].map((part) => part.textContent)")
    assert texts == [node["text"].strip() for node in expected.trace.nodes.values()]
    keys = ["j", "j", "k", "f"]
    tab.ask("document.querySelector('#result .card').focus()")
    assert [tab.press(key) or tab.ask("document.activeElement.id") for key in keys] == ["n2", "n3", "n2", "n2"]
    assert text(tab, "[aria-pressed=true]").startswith("kept")
    tab.ask("document.querySelector('#question').select()")
    for key in "jkf":
        tab.press(key)
    assert tab.ask("document.querySelector('#question').value") == "jkf"  # where people type, they are letters

    tab.browser.send("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    tab.click("#download")
    site.wait((tmp_path / "trace.json").exists)
    trace = parse_trace((tmp_path / "trace.json").read_bytes())
    assert [node["seed"] for node in trace.data["nodes"]] == [node["seed"] for node in expected.trace.data["nodes"]]

    tab.click("#again")
    tab.wait(f"{IDLE} && seen.length > {len(seen) + 8} && document.querySelector('dd.answer')")
    assert tab.ask("seen.at(-1)") == last


@needs_browser
def test_a_search_is_cancelled_and_run_again(site, tab, image):
    fill(tab, image, seed=SEED, rounds=31, candidates=8)
    tab.press("Enter", 2)
    tab.wait("document.querySelectorAll('.retrace').length >= 1")
    assert site.generator.engine.pages_in_use
    tab.press("Escape")
    tab.wait(IDLE)
    assert text(tab, "#status").startswith("Cancelled") and text(tab, "dd.running")
    site.wait_until_nothing_is_held()
    assert tab.ask("document.querySelector('#history').hidden")  # there is no answer to keep
    tab.click("#again")
    tab.wait("document.querySelectorAll('.retrace').length >= 1")
    tab.click("#cancel")
    tab.wait(IDLE)
    site.wait_until_nothing_is_held()
    fill(tab, rounds=1, candidates=2)
    tab.click("#submit")
    tab.wait(f"{IDLE} && document.querySelector('dd.answer')")
    assert tab.ask("document.querySelectorAll('.card').length") == 8


@needs_browser
def test_earlier_questions_stay_in_the_browser_until_they_are_cleared(tab, image):
    for question in ("How many objects are there?", SAMPLE.question):
        tab.ask("document.querySelectorAll('#images button').forEach((button) => button.click())")
        fill(tab, image, question, seed=1, rounds=1, candidates=2)
        tab.click("#submit")
        tab.wait(f"{IDLE} && document.querySelector('#result h1')?.innerText === {json.dumps(question)}")
    answer = text(tab, "dd.answer")
    tab.wait("document.querySelectorAll('.entry').length === 2")
    before = len(tab.of_kind("Network.requestWillBeSent"))
    tab.send("Page.reload")
    tab.wait("document.querySelectorAll('.entry').length === 2 && document.querySelector('#search').options.length")
    tab.click("#history summary")
    assert text(tab, ".entry").split("\n")[0] == SAMPLE.question
    assert tab.ask("document.querySelector('.entry img').src").startswith("data:image/png;base64,")
    tab.click(".entry")
    assert text(tab, "dd.answer") == answer and text(tab, "#status") == f"Answered: {answer}"
    assert tab.ask("['question', 'rounds', 'seed'].map((id) => document.getElementById(id).value)") == [
        *(SAMPLE.question, "1", "1")
    ]
    assert tab.ask("document.querySelector('#again').disabled")  # the image itself is not kept
    tab.click("#entries li:last-child button:last-child")
    tab.wait("document.querySelectorAll('.entry').length === 1")
    tab.click("#clear")
    tab.wait("document.querySelector('#history').hidden")
    asked = [event["request"]["method"] for event in tab.of_kind("Network.requestWillBeSent")[before:]]
    assert "POST" not in asked


@needs_browser
def test_text_is_shown_as_it_is_written_where_nothing_is_taken_back(site, tab, image):
    answer = site.generator.answer(SAMPLE.image, SAMPLE.question, "greedy")
    fill(tab, image)
    tab.ask("""
        search.value = 'greedy';
        search.dispatchEvent(new Event('change'));
        window.shown = [];
        new MutationObserver(() => written.hidden || shown.push(written.textContent))
          .observe(written, { childList: true, attributes: true });
    """)
    assert tab.ask("[candidates.disabled, rounds.disabled]") == [True, True]
    tab.click("#submit")
    tab.wait(f"{IDLE} && document.querySelector('dd.answer')")
    shown = [part for part in tab.ask("shown") if part]
    assert len(shown) > 10 and all(later.startswith(part) for part, later in pairwise(shown))
    assert "<" not in shown[-1] and answer.stages["SUMMARY"].text in shown[-1]
    assert text(tab, "dd.answer") == answer.conclusion and tab.ask("written.hidden")


@needs_browser
def test_what_the_server_refuses_is_said_in_words(site, tab, tmp_path):
    wrong = tmp_path / "wrong.png"
    wrong.write_bytes(b"no image")
    fill(tab, wrong)
    tab.click("#submit")
    tab.wait("document.querySelector('#error').innerText")
    assert "image" in text(tab, "#error") and text(tab, "#status") == "" and tab.ask(IDLE)
    tab.click("#images button")
    limit, site.app.state.gate.limit = site.app.state.gate.limit, 0
    try:
        tab.click("#submit")
        tab.wait("document.querySelector('#error').innerText.includes('in flight')")
        assert "Try again in 2 s, at " in text(tab, "#error")
    finally:
        site.app.state.gate.limit = limit
    (tmp_path / "notes.txt").write_text("no image")
    tab.choose("#files", tmp_path / "notes.txt")
    assert text(tab, "#error") == "notes.txt is no image."
    tab.send("Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=-1, uploadThroughput=-1)
    tab.click("#submit")
    tab.wait("document.querySelector('#error').innerText.includes('reached')")
    assert tab.ask("document.querySelector('#submit').disabled") is False


@needs_browser
def test_what_a_model_and_a_person_write_is_never_markup(browser, tiny, image):
    tokenizer = tiny.processor.tokenizer
    stages = "".join(f"<{name}> {HOSTILE} </{name}>" for name in ("SUMMARY", "CAPTION", "REASONING", "CONCLUSION"))
    tokens = [*tokenizer.encode(stages, add_special_tokens=False), tokenizer.eos_token_id]
    site = Site(SwiresGenerator(says(tiny.model, tokens), tiny.processor, engine=EngineConfig(page_size=4)))
    try:
        tab = browser.open(f"{site.origin}/")
        tab.wait("document.querySelector('#search').options.length")
        tab.ask("window.ran = []; window.run = (what) => ran.push(what);")
        for search in ("swires", "greedy"):
            tab.ask(f"search.value = '{search}'; search.dispatchEvent(new Event('change')); result.replaceChildren()")
            fill(tab, image, f"{HOSTILE}?")
            tab.click("#submit")
            tab.wait(f"{IDLE} && document.querySelector('dd.answer')")
            assert text(tab, "dd.answer") == HOSTILE.strip().replace("\u2028", "\u2028")
            assert HOSTILE.split("\u2028")[0] in text(tab, "#result h1")
        tab.wait("document.querySelectorAll('.entry').length === 2")
        tab.click("#history summary")
        assert tab.ask("[...document.querySelectorAll('.entry bdi')].map((part) => part.textContent)") == [
            *(f"{HOSTILE}?", HOSTILE, f"{HOSTILE}?", HOSTILE)
        ]
        # Marks that reverse text stay in an element of their own.
        assert tab.ask("getComputedStyle(document.querySelector('#status bdi')).unicodeBidi") == "isolate"
        assert tab.ask("document.querySelectorAll('#result :is(script, img, b b), #history script').length") == 0
        tab.ask("new Promise((done) => setTimeout(done, 0))")
        assert tab.ask("ran") == []
        # Even markup that got in would do nothing.
        tab.ask(f"result.insertAdjacentHTML('beforeend', {json.dumps(HOSTILE)})")
        tab.wait("violations.includes('script-src-attr')")
        assert tab.ask("ran") == [] and len(tab.ask("violations")) == 1
        tab.ask("violations.length = 0")
    finally:
        site.close()


@needs_browser
def test_it_fits_a_narrow_screen_and_the_tab_key_reaches_everything(tab, image):
    tab.send("Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=1, mobile=True)
    fill(tab, image, seed=SEED)
    tab.click("#submit")
    tab.wait(f"{IDLE} && document.querySelector('dd.answer')")
    assert tab.ask("document.documentElement.scrollWidth") == 360
    boxes = "[...document.querySelectorAll('#ask *, #tools *, #result > header *, nav *')]"
    outside = f"{boxes}.filter((part) => part.checkVisibility() && part.getBoundingClientRect().right > 360)"
    assert tab.ask(f"{outside}.map((part) => part.outerHTML)") == []
    reached = set()
    tab.ask("document.activeElement.blur()")
    for _ in range(40):
        tab.press("Tab")
        reached.add(tab.ask("document.activeElement.id || document.activeElement.localName"))
    wanted = {"files", "question", "search", "candidates", "rounds", "tokens", "seconds", "seed", "submit"}
    assert wanted | {"summary", "again", "download", "button", "n1", "n2"} <= reached


@needs_browser
def test_images_are_pasted_and_dropped(tab, image):
    data = f"Uint8Array.from({[*image.read_bytes()]})"
    tab.ask(f"""
        const transfer = new DataTransfer();
        transfer.items.add(new File([{data}], 'a.png', {{ type: 'image/png' }}));
        document.dispatchEvent(new ClipboardEvent('paste', {{ clipboardData: transfer, bubbles: true }}));
        const drop = {{ dataTransfer: transfer, bubbles: true, cancelable: true }};
        document.body.dispatchEvent(new DragEvent('drop', drop));
    """)
    tab.wait("[...document.querySelectorAll('#images img')].filter((image) => image.naturalWidth).length === 2")
    tab.click("#images button")
    assert tab.ask("document.querySelectorAll('#images img').length") == 1


def test_its_headers_and_its_names(site):
    page = httpx.get(f"{site.origin}/")
    assert page.headers["content-type"] == "text/html; charset=utf-8" and page.headers["cache-control"] == "no-store"
    policy = dict(part.split(" ", 1) for part in page.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'" and policy["script-src"] == policy["style-src"] == "'self'"
    assert policy["base-uri"] == policy["form-action"] == policy["frame-ancestors"] == "'none'"
    for name in ("page.js", "trace.js", "trace.css", "searches.json"):
        file = httpx.get(f"{site.origin}/page/{name}")
        assert file.status_code == 200 and file.headers["x-content-type-options"] == "nosniff"
        assert file.headers["content-security-policy"] == page.headers["content-security-policy"]
    for name in ("routes.py", "__init__.py", "..%2froutes.py", "%2e%2e/app.py", "page.js%00", "", "nav.js"):
        assert httpx.get(f"{site.origin}/page/{name}").status_code == 404


def test_the_settings_that_it_offers_are_those_of_the_searches(site):
    offered = httpx.get(f"{site.origin}/page/searches.json").json()
    assert [*offered] == [*POLICIES, *PRESETS]
    for search, settings in offered.items():
        assert {setting["name"] for setting in settings.values()} <= {*settings_of(search)}
    assert offered["swires"]["rounds"] == {"name": "max_rounds", "default": 3} and offered["greedy"] == {}
    assert offered["swires:published"]["candidates"] == {"name": "candidates", "default": 2}
