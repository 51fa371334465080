"""One reader of data files for every command, in which no row's type depends on another row."""

import codecs
import json
import os

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from llava_cot.data import rows as module
from llava_cot.data.rows import parse_row, parsed_rows, raw_rows

ROWS = [
    {"id": "2024-01-02", "image": None},
    {"id": 7, "late": {"deep": [1.5, None, True]}},
    {"id": 10**30, "image": ["a.png", "b.png"], "text": 'two\u2028lines, "quoted" \\ [{,]} \n'},
    {"id": "ü", "text": "\U0001f600"},
]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def lines(rows, **options):
    return "".join(json.dumps(row, **options) + "\n" for row in rows).encode()


FORMS = {
    "lines": lines(ROWS),
    "lines in UTF-8": lines(ROWS, ensure_ascii=False),
    "lines with a byte order mark": codecs.BOM_UTF8 + lines(ROWS, ensure_ascii=False),
    "lines of Windows": lines(ROWS).replace(b"\n", b"\r\n"),
    "lines without a last end": lines(ROWS)[:-1],
    "array on one line": json.dumps(ROWS).encode(),
    "array without spaces": json.dumps(ROWS, separators=(",", ":"), ensure_ascii=False).encode(),
    "array on many lines": json.dumps(ROWS, indent=2).encode() + b"\n",
    "array of Windows with a mark": codecs.BOM_UTF8 + json.dumps(ROWS, indent=1).replace("\n", "\r\n").encode(),
    "array with one row a line": b"[" + b",\n".join(json.dumps(row).encode() for row in ROWS) + b"]\n\n",
    "array behind blank lines": b"\n \n" + json.dumps(ROWS, indent=0).encode(),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("block", [1, 7, module.BLOCK])
def test_every_form_has_the_same_rows(tmp_path, monkeypatch, form, block):
    monkeypatch.setattr(module, "BLOCK", block)
    path = tmp_path / "data.jsonl"
    path.write_bytes(FORMS[form])
    assert [row for _, row in parsed_rows(path)] == ROWS
    assert all(raw.count(b"\n") <= 1 for raw in raw_rows(path))  # so each may become a line of another file
    if not form.startswith("lines without"):
        assert all(raw.endswith(b"\n") for raw in raw_rows(path))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(JSON.filter(lambda row: row is not None), min_size=2), st.sampled_from([None, 0, 3]), st.integers(1, 64)
)
def test_any_array_is_read_like_its_lines(tmp_path, found, indent, block):
    path, before = tmp_path / "any", module.BLOCK
    path.write_text(json.dumps(found, indent=indent))
    module.BLOCK = block
    try:
        assert [parse_row(raw) for raw in raw_rows(path)] == found
    finally:
        module.BLOCK = before


def test_a_list_may_be_a_bad_row_among_lines(tmp_path):
    path = tmp_path / "data.jsonl"
    for first in ([1], [], [ROWS[0]]):
        path.write_bytes(lines([first, *ROWS]))
        assert [row for _, row in parsed_rows(path)] == [first, *ROWS]
    for torn in (b"[", b'[{"id": 1', b"[[[]"):
        path.write_bytes(torn + b"\n" + lines([ROWS[0], [1]]))
        assert [parse_row(raw) for raw in [*raw_rows(path)][1:]] == [ROWS[0], [1]]


@pytest.mark.parametrize("content", [b"", b"\n \n", b"[]", b"[\n]\n", codecs.BOM_UTF8])
def test_no_rows(tmp_path, content):
    (tmp_path / "data").write_bytes(content)
    assert list(parsed_rows(tmp_path / "data")) == []


def test_numbers_count_blank_lines(tmp_path):
    (tmp_path / "data").write_bytes(b"\n{}\n \n{}")
    assert [number for number, _ in parsed_rows(tmp_path / "data")] == [2, 4]


def test_a_table_guesses_nothing_and_hides_nothing(tmp_path):
    path = tmp_path / "data.bin"
    talk = [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]
    columns = {"id": ["a", "2024-01-02"], "image": [None, "b.png"], "conversations": [talk, talk]}
    parquet.write_table(pa.table(columns), path)
    assert [row for _, row in parsed_rows(path)] == [dict(zip(columns, row)) for row in zip(*columns.values())]
    # what JSON does not have is neither a text nor a path
    odd = {"id": pa.array([1, 2], pa.timestamp("s")), "image": [{"bytes": b"\x89PNG", "path": "a"}] * 2}
    parquet.write_table(pa.table(odd), path)
    first, _ = (row for _, row in parsed_rows(path))
    assert first == {
        "id": {"datetime": "1970-01-01 00:00:01"},
        "image": {"bytes": {"bytes": "4 bytes"}, "path": "a"},
    }
    parquet.write_table(pa.table({"id": pa.array([])}), path)
    assert list(raw_rows(path)) == []
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"data must be a Parquet table, got '.*data.bin': "):
        list(raw_rows(path))


@pytest.mark.parametrize(
    "raw, message",
    [
        (b'{"id": NaN}', "NaN is no JSON"),
        (b'[{"a": -Infinity}]', "-Infinity is no JSON"),
        (b'{"image": "a", "id": 1, "image": "a"}', "an object must have each key once, got 'image' twice"),
        (b'{"x": {"": 1, "": 2}}', "got '' twice"),
        (b'[{"id": 1, "\\u0069d": 2}]', "got 'id' twice"),
        (b"[" * 100_000, "it is nested too deeply"),
        (b"{'id': 1}", "Expecting property name"),
        (b"\xff{}", "can't decode byte 0xff"),
        (b'{"id": %s}' % (b"9" * 5000), "Exceeds the limit"),
    ],
)
def test_strict_json(raw, message):
    with pytest.raises(ValueError, match=message):
        parse_row(raw)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"{}\n{", r"row 2 of '.*data': Expecting property name"),
        (b'[{"id": 1},\n{"id": 2]\n', r"row 2 of '.*data' is not JSON"),
        (b'[{"id": 1}\n{"id": 2}]', r"row 1 of '.*data' must be followed by ',' or '\]', got '\{'"),
        (b"[\n{},\n{}", r"row 1 of '.*data': Expecting value"),  # torn off, so these are three lines
        (b"[\n{},\n]", r"row 2 of '.*data' is not JSON"),
        (b"[\n{}]\n{}]", r"data must end with its array, got '\{' behind row 1 of '.*data'"),
        (b"[\n" + b"[" * 100_000 + b"\n]", r"row 1 of '.*data': it is nested too deeply"),
        (b'[\n{"id": "\xff"}]', "can't decode byte 0xff"),
        ("{}\n".encode("utf-16"), r"data must be in UTF-8, got UTF-16 in '.*data'"),
        ("{}\n".encode("utf-32"), r"data must be in UTF-8, got UTF-32 in '.*data'"),
        (codecs.BOM_UTF32_BE + "{}\n".encode("utf-32-be"), r"data must be in UTF-8, got UTF-32 in '.*data'"),
    ],
)
def test_files_that_cannot_be_read_name_the_row(tmp_path, content, message):
    (tmp_path / "data").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(parsed_rows(tmp_path / "data"))


def test_a_row_of_64_mib_is_no_row(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_ROW", 1000)
    monkeypatch.setattr(module, "BLOCK", 64)
    for begin, end in ((b"", b""), (b"[\n{},\n", b"]")):
        (tmp_path / "data").write_bytes(begin + b'"' + b"x" * 5000 + b'"' + end)
        with pytest.raises(ValueError, match=r"row \d of '.*' must have at most 1000 bytes, got more"):
            list(raw_rows(tmp_path / "data"))


def test_a_long_array_is_never_all_in_memory(tmp_path):
    """Reads 16 MB of an array through a buffer of a few megabytes."""
    import tracemalloc

    path, text = tmp_path / "data", "x" * 4000
    with open(path, "w") as file:
        file.write("[")
        file.write(",\n".join(json.dumps({"id": number, "text": text}) for number in range(4000)))
        file.write("]")
    tracemalloc.start()
    try:
        assert sum(1 for _ in raw_rows(path)) == 4000
        assert tracemalloc.get_traced_memory()[1] < os.path.getsize(path) / 2
    finally:
        tracemalloc.stop()
