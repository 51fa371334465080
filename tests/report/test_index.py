"""The page of many traces: its rows, its filters, and that nothing of a trace is markup."""

import json
import re
from html import unescape

import pytest
from helpers.page import Page, ask, needs_browser
from helpers.traces import HOSTILE, failed, loop, sentences, spent, two_retraces
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_cot.report.index import to_index
from llava_cot.report.summary import Entry, summarise, totals
from llava_cot.trace import parse_trace


def entries():
    return [
        Entry(two_retraces(), "4 & 5", "00001.html"),
        Entry(loop(), "seven", "a #b?.html"),
        Entry(sentences()),
        Entry(None, source=HOSTILE, error="not JSON"),
        Entry(spent(), 'x" onload="y'),
    ]


def rows_of(page):
    """The classes and the cells of each row."""
    body = page.partition("<tbody>")[2].partition("</tbody>")[0]
    rows = re.findall(r'<tr class="(.*?)".*?>(.*?)</tr>', body, re.DOTALL)
    return [(kinds.split(), re.findall(r"<td.*?>(.*?)</td>", cells, re.DOTALL)) for kinds, cells in rows]


def test_a_row_for_each_trace():
    page = to_index(entries(), "<Traces>")
    rows = rows_of(page)
    assert [kinds for kinds, _ in rows] == [
        ["right", "retraced", "malformed"],
        ["wrong", "retraced"],
        ["malformed"],
        ["failed"],
        ["wrong"],
    ]
    number, question, answer, gold, verdict, search, rounds, retraces, tokens, wasted, _, malformed = rows[0][1]
    assert (number, answer, gold, verdict, search) == ("1", "4 &amp; 5", "4 &amp; 5", "✓ right", "swires")
    assert (rounds, retraces, tokens, wasted) == ("3", "2", "51", "86%")
    assert unescape(malformed) == "<REASONING> opens inside CAPTION"
    assert question.startswith('<a href="00001.html">How many? &lt;/script&gt;')
    assert 'href="a%20%23b%3F.html"' in rows[1][1][1]
    assert "<a" not in rows[2][1][1] and rows[2][1][4] == ""  # no page, and no gold answer
    assert unescape(rows[3][1][1]) == f"✗ failed: {HOSTILE}: not JSON"
    text = Page(page).text
    assert "<Traces>4 traces · 33.3% of 3 right · 2 retraced · 2 malformed · 1 could not be read · 375 tokens" in text


def test_what_is_no_trace_is_a_row_that_says_so():
    row = summarise(Entry(None, source="a.json", href="00001.html", error="trace.version must be 5, got 1"))
    assert row.error == "trace.version must be 5, got 1" and row.source == "a.json" and row.href is None


def test_a_failed_search_is_a_row_with_a_page_and_is_never_right():
    entry = Entry(failed(), "4", "00001.html")
    row = summarise(entry)
    assert row.error is None and row.failure.startswith("RuntimeError: out of memory") and row.is_right is False
    page = to_index([entry, Entry(spent(), "7"), Entry(None, error="not JSON")])
    kinds, cells = rows_of(page)[0]
    assert kinds == ["wrong", "failed"] and '<a href="00001.html">' in cells[1]
    assert unescape(cells[2]) == f"✗ failed: {row.failure}"
    assert "2 traces · 50.0% of 2 right · 0 retraced · 0 malformed · 1 failed · 1 could not be read" in Page(page).text


def test_totals_are_of_what_could_be_read():
    all = totals("all", [summarise(entry) for entry in entries()])
    assert (all.traces, all.unread, all.known, all.right, all.retraced, all.malformed) == (4, 1, 3, 1, 2, 2)
    assert all.accuracy == "33.3% of 3" and totals("none", []).accuracy == "–" and totals("none", []).wasted == 0


def test_it_is_one_file_that_loads_nothing():
    page = to_index(entries())
    parsed = Page(page)
    assert not parsed.open and parsed.names.count("script") == 1 and "link" not in parsed.names
    assert "default-src 'none'" in page and "url(" not in page and "@import" not in page
    given = entries()
    assert to_index(iter(given)) == to_index(given)


def test_a_row_is_small_whatever_its_trace_is():
    data = json.loads(spent().to_json())
    data["question"] = "x" * 100_000
    data["nodes"][-1]["text"] = "y" * 100_000
    page = to_index([Entry(parse_trace(data), "z" * 100_000)])
    assert "x" * 300 + "…" in page and len(page) < 20_000


words = st.one_of(
    st.text(st.characters(), max_size=30), st.sampled_from([HOSTILE, "javascript:alert(1)", '"><b>', "\ud83d"])
)


@settings(max_examples=60, deadline=None)
@given(words, words, words, words, words, words)
def test_no_text_becomes_markup(question, answer, gold, href, source, error):
    data = json.loads(spent().to_json())
    data["question"], data["nodes"][-1]["text"] = question, answer
    page = to_index(
        [Entry(parse_trace(data), gold, href, source), Entry(None, source=source, error=error)], title=question
    )
    parsed, plain = Page(page), Page(to_index([Entry(spent(), "7", "a.html"), Entry(None)]))
    assert not parsed.open and parsed.names == plain.names and parsed.scripts == plain.scripts
    (link,) = (attributes["href"] for tag, attributes in parsed.elements if tag == "a")
    assert not re.match(r"\s*[a-z]+:", link or "")
    page.encode()


FILTERS = """
const shown = () => [...document.querySelectorAll("tbody tr")].filter((row) => row.checkVisibility())
  .map((row) => Number(row.cells[0].textContent));
const found = {};
for (const button of document.querySelectorAll("nav button")) {
  button.click();
  found[button.textContent] = shown();
}
const press = (key) => document.activeElement.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
document.activeElement.blur();
press("f");
found.f = shown();
press("/");
found.text = document.activeElement.type;
document.activeElement.value = "SEEN";
document.activeElement.dispatchEvent(new Event("input"));
found.seen = shown();
press("Escape");
press("Escape");
found.cleared = shown();
const sort = (name) => [...document.querySelectorAll("th button")].find((b) => b.textContent === name).click();
sort("tokens");
found.tokens = shown();
sort("tokens");
found.reversed = [shown(), document.querySelector("[aria-sort]").getAttribute("aria-sort")];
sort("question");
found.question = shown();
sort("#");
press("j");
press("j");
press("ArrowDown");
press("k");
found.row = Number(document.activeElement.cells[0].textContent);
let opened = null;
document.addEventListener("click", (event) => { opened = event.target.getAttribute("href"); event.preventDefault(); });
press("Enter");
found.opened = opened;
return found;
"""


@needs_browser
def test_filters_text_sorting_and_keys_in_a_browser(tmp_path):
    file = tmp_path / "index.html"
    file.write_text(to_index(entries()), encoding="utf-8")
    found = ask(file, FILTERS)
    assert found["all (5)"] == [1, 2, 3, 4, 5]
    assert found["wrong (2)"] == [2, 5]
    assert found["retraced (2)"] == [1, 2]
    assert found["malformed (2)"] == [1, 3]
    assert found["failed (1)"] == [4]
    assert found["f"] == [1, 2, 3, 4, 5]  # after the last comes the first
    assert found["text"] == "search" and found["seen"] == [3] and found["cleared"] == [1, 2, 3, 4, 5]
    assert found["tokens"] == [3, 5, 1, 2, 4] and found["reversed"] == [[2, 1, 5, 3, 4], "ascending"]
    assert found["question"][-1] == 3  # "What is to be seen?"
    assert (found["row"], found["opened"]) == (2, "a%20%23b%3F.html")


@pytest.mark.parametrize("gold, is_right", [(None, None), ("7.0", True), ("(7)", True), ("8", False)])
def test_right_is_what_means_the_same(gold, is_right):
    assert summarise(Entry(spent(), gold)).is_right is is_right
