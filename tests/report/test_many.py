"""Many traces of a folder or a file: what is read, what is written, and what is said of the rest."""

import io
import json
import tracemalloc

import pytest
from helpers.page import Page
from helpers.traces import loop, spent, two_retraces
from rich.console import Console

from llava_cot.atomic import replacing
from llava_cot.report.many import read_rows, to_table, write_pages


def line(trace, **facts):
    return json.dumps({"trace": json.loads(trace.to_json()), **facts})


@pytest.fixture
def folder(tmp_path):
    """Three traces that can be read and five that can't."""
    path = tmp_path / "traces"
    path.mkdir()
    lines = [
        line(two_retraces(), gold="4 & 5", image="a.png", id="x"),
        "",
        loop().to_json(),
        '{"trace',
        line(spent(), gold=7),
        line(spent(), gold=[7]),
        "[" * 100_000,
        '{"version": 2}',
    ]
    (path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (path / "b.JSON").write_bytes(b"\xff\xff")
    (path / "notes.txt").write_text("not looked at")
    return path


def test_every_trace_in_order_and_what_is_wrong_with_the_others(folder):
    rows = read_rows(folder)
    assert [row.source for row in rows] == [*(f"a.jsonl, line {n}" for n in (1, 3, 4, 5, 6, 7, 8)), "b.JSON"]
    assert [row.gold for row in rows[:2]] == ["4 & 5", None] and rows[3].gold == "7"
    assert [row.is_right for row in rows if row.error is None] == [True, None, True]
    errors = [row.error for row in rows if row.error is not None]
    assert errors[0].startswith("not JSON, column 2: Unterminated string")
    assert errors[1] == "gold must be a string or a number, got list"
    assert errors[2] == "not JSON that can be read: it is nested too deeply"
    assert errors[3] == "trace.version must be 7, got 2"
    assert "can't decode" in errors[4]
    assert read_rows(folder / "a.jsonl") == rows[:-1]


def test_a_page_for_each_and_an_index_that_links_to_them(folder, tmp_path):
    out = tmp_path / "new" / "pages"
    rows = write_pages(folder, out)
    pages = ["00001.html", "00002.html", "00004.html"]
    assert sorted(file.name for file in out.iterdir()) == [*pages, "index.html"]
    index = Page((out / "index.html").read_text("utf-8"))
    assert [attributes["href"] for tag, attributes in index.elements if tag == "a"] == pages
    assert [row.href for row in rows if row.href] == pages
    assert "5 could not be read" in index.text and "a.jsonl, line 4: not JSON" in index.text
    assert "gold7 ✓ the same" in Page((out / pages[2]).read_text("utf-8")).text


def test_no_trace_is_an_error_that_names_the_first(tmp_path):
    with pytest.raises(ValueError, match=r"must hold traces as \.json or \.jsonl, got none"):
        read_rows(tmp_path)
    (tmp_path / "a.jsonl").write_text("\n{\n[1]\n")
    with pytest.raises(ValueError, match=r"got 2 that can't; the first is a\.jsonl, line 2: not JSON, column 2"):
        write_pages(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out" / "index.html").exists()


def test_no_half_written_file(tmp_path):
    file = tmp_path / "page.html"

    def write_text(file, text):
        with replacing(file) as opened:
            opened.write(text)

    write_text(file, "before")
    with pytest.raises(UnicodeEncodeError):
        write_text(file, "x" * 10_000 + "\ud83d")
    assert file.read_text() == "before" and list(tmp_path.iterdir()) == [file]
    write_text(file, "after")
    assert file.read_text() == "after" and list(tmp_path.iterdir()) == [file]


def test_memory_does_not_grow_with_the_number_of_traces(tmp_path):
    data = json.loads(spent().to_json())
    data["nodes"][0]["text"] = "x" * 300_000
    one = json.dumps(data) + "\n"
    peaks = []
    for count in (2, 20):
        file = tmp_path / f"{count}.jsonl"
        with file.open("w") as lines:
            lines.writelines(one for _ in range(count))
        tracemalloc.start()
        write_pages(file, tmp_path / str(count))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 300_000  # less than one trace more


def test_the_table_has_a_line_for_each_search_and_one_for_all(folder):
    rows = read_rows(folder)
    rows += [type(row)(**{**vars(row), "search": "[b]greedy", "is_right": False}) for row in rows if row.error is None]
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(to_table(rows))
    lines = [" ".join(part.split()) for part in console.export_text().splitlines()]
    assert lines[0] == "search traces accuracy retraced malformed tokens wasted seconds"
    assert lines[1].startswith("[b]greedy 3 0.0% of 3 2 1 123 ")
    assert lines[2].startswith("swires 3 100.0% of 2 2 1 123 ")
    assert lines[3].startswith("all 6 40.0% of 5 4 2 246 ")
