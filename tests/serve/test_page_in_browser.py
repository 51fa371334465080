"""The page at ``/`` in a browser, on a real server with a real engine."""

import json
import threading
from contextlib import closing, contextmanager
from itertools import pairwise

import pytest
import uvicorn
from helpers.browser import DEADLINE, browsing, until
from helpers.page import needs_browser
from helpers.says import says

from llava_cot import SwiresGenerator
from llava_cot.data import shapes
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
    """A server in this process, for a model or a gate that no command line can set."""

    def __init__(self, generator, **options):
        self.generator = generator
        self.app = create_app(generator, name="tiny", **options)
        self.server = uvicorn.Server(uvicorn.Config(self.app, port=0, log_level="warning"))
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        until(lambda: self.server.started)
        self.url = f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}"

    def close(self):
        self.server.should_exit = True
        self.thread.join(DEADLINE)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with browsing(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@contextmanager
def opened(browser, url, key=None):
    """The page. Nothing that it does may violate its policy, leave its origin or fail."""
    tab = browser.open(f"{url if key is None else url.replace('//', f'//user:{key}@')}/")
    tab.wait("document.querySelector('#search').options.length")
    yield tab
    tab.assert_clean(url)
    tab.close()


@pytest.fixture
def tab(server, browser):
    with opened(browser, server.url) as tab:
        yield tab
    server.assert_nothing_held()


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
def test_a_search_with_two_retraces_is_seen_live(tiny, tab, image, tmp_path):
    expected = tiny.answer(SAMPLE.image, SAMPLE.question, seed=SEED)
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
    board = "getComputedStyle(document.querySelector('.board')).gridTemplateColumns.split(' ').length"
    assert tab.ask(board) == 4
    lefts = tab.ask(
        "[...document.querySelectorAll('.retrace p')].map((part) => parseFloat(getComputedStyle(part).left))"
    )
    assert all(left > 0 for left in lefts)
    assert text(tab, "#status") == f"Answered: {expected.conclusion}"

    texts = tab.ask("[...document.querySelectorAll('.card .text')].map((part) => part.textContent)")
    assert texts == [node["text"].strip() for node in expected.trace.nodes.values()]
    keys = ["j", "j", "k", "k", "f"]
    tab.ask("document.querySelector('#result .card').focus()")
    assert [tab.press(key) or tab.ask("document.activeElement.id") for key in keys] == ["n2", "n3", "n2", "n1", "n1"]
    assert text(tab, "[aria-pressed=true]").startswith("kept")
    tab.ask("document.querySelector('#question').select()")
    for key in "jkf":
        tab.press(key)
    assert tab.ask("document.querySelector('#question').value") == "jkf"  # where people type, they are letters

    tab.download_to(tmp_path)
    tab.click("#download")
    until((tmp_path / "trace.json").exists)
    trace = parse_trace((tmp_path / "trace.json").read_bytes())
    assert [node["seed"] for node in trace.data["nodes"]] == [node["seed"] for node in expected.trace.data["nodes"]]

    tab.click("#again")
    tab.wait(f"{IDLE} && seen.length > {len(seen) + 8} && document.querySelector('dd.answer')")
    assert tab.ask("seen.at(-1)") == last


@needs_browser
def test_a_search_is_cancelled_and_run_again(server, tab, image):
    fill(tab, image, seed=SEED, rounds=31, candidates=2)  # as many as the server lets one draw
    tab.press("Enter", 2)
    tab.wait("document.querySelectorAll('.retrace').length >= 1")
    assert server.metrics()["num_searches_running"] == 1
    tab.press("Escape")
    tab.wait(IDLE)
    assert text(tab, "#status").startswith("Cancelled")
    assert "running" not in text(tab, "#result header") and text(tab, ".retrace")
    server.assert_nothing_held()
    assert tab.ask("document.querySelector('#history').hidden")  # there is no answer to keep
    tab.click("#again")
    tab.wait("document.querySelectorAll('.retrace').length >= 1")
    tab.click("#cancel")
    tab.wait(IDLE)
    server.assert_nothing_held()
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
def test_text_is_shown_as_it_is_written_where_nothing_is_taken_back(tiny, tab, image):
    answer = tiny.answer(SAMPLE.image, SAMPLE.question, "greedy")
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
def test_what_the_server_refuses_is_said_in_words(browser, tiny, tmp_path):
    site = Site(SwiresGenerator(tiny.model, tiny.processor))
    with closing(site), opened(browser, site.url) as tab:
        check_refusals(site, tab, tmp_path)


@needs_browser
def test_a_key_in_the_address_opens_it(browser, tiny, image):
    site = Site(SwiresGenerator(tiny.model, tiny.processor), api_keys=("secret",))
    with closing(site), opened(browser, site.url, "secret") as tab:
        fill(tab, image, candidates=1, rounds=1)
        tab.click("#submit")
        tab.wait(f"{IDLE} && document.querySelector('dd.answer')")


def check_refusals(site, tab, tmp_path):
    wrong = tmp_path / "wrong.png"
    wrong.write_bytes(b"no image")
    fill(tab, wrong)
    tab.click("#submit")
    tab.wait("document.querySelector('#error').innerText")
    assert "image" in text(tab, "#error") and text(tab, "#status") == "" and tab.ask(IDLE)
    tab.click("#images button")
    site.app.state.gate.limit = 0
    tab.click("#submit")
    tab.wait("document.querySelector('#error').innerText.includes('in flight')")
    assert "Try again in 2 s, at " in text(tab, "#error")
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
    site = Site(SwiresGenerator(says(tiny.model, tokens), tiny.processor))
    with closing(site), opened(browser, site.url) as tab:
        check_hostile_text(tab, image)
        tab.assert_clean(site.url)
        check_that_markup_does_nothing(tab)


def check_hostile_text(tab, image):
    tab.ask("window.ran = []; window.run = (what) => ran.push(what);")
    for search, numbers in (("swires", {"candidates": 2, "rounds": 1}), ("greedy", {})):
        tab.ask(f"search.value = '{search}'; search.dispatchEvent(new Event('change')); result.replaceChildren()")
        fill(tab, image, f"{HOSTILE}?", **numbers)
        tab.click("#submit")
        tab.wait(f"{IDLE} && document.querySelector('dd.answer')")
        assert tab.ask("document.querySelector('dd.answer').textContent") == HOSTILE
        assert tab.ask("document.querySelector('#result h1').textContent") == f"{HOSTILE}?"
        assert tab.ask("[...document.querySelectorAll('#result :is(script, img, h1 *, dd.answer b)')].length") == 0
    tab.wait("document.querySelectorAll('.entry').length === 2")
    tab.click("#history summary")
    assert tab.ask("[...document.querySelectorAll('.entry bdi')].map((part) => part.textContent)") == [
        *(f"{HOSTILE}?", HOSTILE, f"{HOSTILE}?", HOSTILE)
    ]
    # Marks that reverse text stay in an element of their own.
    assert tab.ask("getComputedStyle(document.querySelector('#status bdi')).unicodeBidi") == "isolate"
    assert tab.ask("ran") == []


def check_that_markup_does_nothing(tab):
    """Even markup that got in would do nothing."""
    tab.ask(f"result.insertAdjacentHTML('beforeend', {json.dumps(HOSTILE)})")
    tab.wait("violations.length")
    assert tab.ask("ran") == [] and tab.ask("violations.splice(0)") == ["script-src-attr"]
    tab.ask("result.insertAdjacentHTML('beforeend', '<p id=styled style=\"display: none\">')")
    tab.wait("violations.length")
    assert tab.ask("getComputedStyle(styled).display") == "block"
    assert tab.ask("violations.splice(0)") == ["style-src-attr"]
    tab.events[:] = [event for event in tab.events if event["method"] != "Log.entryAdded"]


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
    tab.ask("document.querySelector('#files').focus()")
    reached = {"files"}
    for _ in range(40):
        tab.press("Tab")
        reached.add(tab.ask("document.activeElement.id || document.activeElement.localName"))
    wanted = {"files", "question", "search", "candidates", "rounds", "tokens", "seconds", "seed", "submit"}
    assert wanted | {"summary", "again", "download", "button", "n1", "n2"} <= reached


@needs_browser
def test_images_are_pasted_and_dropped(tab, image):
    data = f"Uint8Array.from({[*image.read_bytes()]})"
    tab.ask(f"""
        const [pasted, dropped] = ['a.png', 'b.png'].map((name) => {{
          const transfer = new DataTransfer();
          transfer.items.add(new File([{data}], name, {{ type: 'image/png' }}));
          return transfer;
        }});
        document.dispatchEvent(new ClipboardEvent('paste', {{ clipboardData: pasted, bubbles: true }}));
        document.body.dispatchEvent(new DragEvent('drop', {{ dataTransfer: dropped, bubbles: true }}));
    """)
    tab.wait("[...document.querySelectorAll('#images img')].filter((image) => image.naturalWidth).length === 2")
    tab.click("#images button")
    assert tab.ask("document.querySelectorAll('#images img').length") == 1
