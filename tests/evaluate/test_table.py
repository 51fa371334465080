"""Tables are read as they were written, row by row in any order. What is broken is refused with file, row, reason."""

import csv
import hashlib
import io
import json
import pickle
import re
import subprocess
import sys

import pytest
from helpers.benchmark_files import base64_png, hf_image, write_jsonl, write_parquet, write_tsv
from hypothesis import given
from hypothesis import strategies as st

from llava_cot.evaluate.files.table import open_table

CELLS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
ROWS = st.lists(st.tuples(CELLS, CELLS, CELLS), min_size=1, max_size=12)
HEADER = ("index", "question", "image")


def scanned(path):
    table = open_table(path)
    return table, list(table.scan())


@given(rows=ROWS, end=st.sampled_from(["\n", "\r\n"]), bom=st.booleans())
def test_a_tsv_is_read_as_it_was_written(tmp_path_factory, rows, end, bom):
    path = tmp_path_factory.mktemp("tsv") / "file.tsv"
    text = io.StringIO()
    has_return = any("\r" in cell for row in rows for cell in row)  # which csv quotes from Python 3.13 on alone
    quoting = csv.QUOTE_ALL if has_return else csv.QUOTE_MINIMAL
    csv.writer(text, delimiter="\t", lineterminator=end, quoting=quoting).writerows([HEADER, *rows])
    path.write_bytes(text.getvalue().encode("utf-8-sig" if bom else "utf-8"))
    table, found = scanned(path)
    assert table.columns == HEADER
    assert [tuple(row.values()) for row in found] == rows
    assert [table.row(number) for number in reversed(range(len(table)))] == found[::-1]
    assert table.md5 == hashlib.md5(path.read_bytes()).hexdigest()


def test_a_tsv_of_pandas_is_read_as_pandas_reads_it(tmp_path):
    pandas = pytest.importorskip("pandas")
    rows = [
        {"index": 3, "question": 'Say "hi"\tor\nnot?', "A": None, "score": 1.5},
        {"index": 4, "question": "\r\n é 猫", "A": "", "score": None},
    ]
    path = tmp_path / "file.tsv"
    pandas.DataFrame(rows).to_csv(path, sep="\t", index=False)
    _, found = scanned(path)
    frame = pandas.read_csv(path, sep="\t", dtype=str, keep_default_na=False)
    assert found == frame.to_dict("records")


@given(rows=st.lists(st.dictionaries(CELLS, CELLS | st.integers() | st.none(), max_size=4), min_size=1, max_size=8))
def test_json_lines_are_read_as_they_were_written(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("jsonl") / "file.txt"
    path.write_text("\n" + "\n \n".join(map(json.dumps, rows)), "utf-8")
    table, found = scanned(path)
    assert found == rows
    assert table.columns == tuple(rows[0])
    assert [table.row(number) for number in reversed(range(len(table)))] == rows[::-1]
    assert table.md5 == hashlib.md5(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("row_group_size", [1, 7, 100])
def test_parquet_is_read_as_it_was_written(tmp_path, row_group_size):
    pytest.importorskip("pyarrow")
    rows = [{"index": number, "options": ["a", "b"], "image": hf_image(number)} for number in range(23)]
    write_parquet(tmp_path / "data.bin", rows, row_group_size)
    table, found = scanned(tmp_path / "data.bin")
    assert found == rows
    assert table.columns == ("index", "options", "image")
    for number in (22, 0, 7, 8, 3, 22, 21):
        assert table.row(number) == rows[number]
        assert table.row(number, ["options"]) == {"options": ["a", "b"]}
        assert table.row(number, ["unknown"]) == {}
    assert table.md5 == hashlib.md5((tmp_path / "data.bin").read_bytes()).hexdigest()
    assert pickle.loads(pickle.dumps(table)).row(5) == rows[5]


def test_a_folder_of_shards_is_one_table(tmp_path):
    pytest.importorskip("pyarrow")
    rows = [{"index": number, "text": "x" * number} for number in range(10)]
    paths = [tmp_path / f"test-0000{shard}-of-00003.parquet" for shard in range(3)]
    for path, part in zip(paths, (rows[:4], rows[4:5], rows[5:])):
        write_parquet(path, part, 2)
    table, found = scanned(tmp_path)
    assert found == rows and len(table) == 10
    assert [table.row(number) for number in (9, 4, 3, 0, 5)] == [rows[number] for number in (9, 4, 3, 0, 5)]
    assert table.md5 == hashlib.md5(b"".join(path.read_bytes() for path in paths)).hexdigest()
    write_parquet(paths[2], [{"index": 1}])
    with pytest.raises(ValueError, match=r"test-00002-of-00003\.parquet: its columns must be those of test-00000"):
        open_table(tmp_path)


def test_a_row_is_read_again_in_any_order_after_pickling(tmp_path):
    rows = write_tsv(tmp_path / "file.tsv", [{"index": str(n), "image": base64_png(n)} for n in range(50)])
    table, _ = scanned(tmp_path / "file.tsv")
    copy = pickle.loads(pickle.dumps(table))
    assert [copy.row(number) for number in (49, 0, 17)] == [rows[number] for number in (49, 0, 17)]


HEAD = b"index\tquestion\timage\n"


@pytest.mark.parametrize(
    ("content", "wrong"),
    [
        (b"", "it is empty"),
        (bytes(range(256)) * 10, "it must be tab-separated, JSON lines or parquet, and starts with b'\\x00\\x01"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\t", "it must be tab-separated, JSON lines or parquet"),
        (b"a,b,c\n1,2,3\n", "it must be tab-separated"),
        (b"[1, 2]\n", "it must be tab-separated"),
        (b"a\tb\ta\n1\t2\t3\n", "its columns must have different names, and ['a'] are there more than once"),
        (HEAD + b"1\tq\ti\n2\tq\n", "row 2: it has 2 cells and the header has 3; is the file truncated?"),
        (HEAD + b"1\tq\ti\n2\tq\ti\textra\n3\tq\ti\n", "row 2: it has 4 cells and the header has 3"),
        (HEAD + b'1\tq\ti\n2\t"q\ti\n3\tq\ti\n', "row 2: a quoted cell is not closed"),
        (HEAD + b'1\tq\ti\n2\t"q"x\ti\n', "row 2: a quoted cell is not closed"),
        (HEAD + b"1\tq\ti\n2\tq\xff\ti\n", "row 2: 'utf-8' codec can't decode byte 0xff"),
        (b"ind\xffex\tq\n1\tq\n", "its header can't be read: 'utf-8' codec can't decode byte 0xff"),
        (b'{"a": 1}\n{"a": 2\n', "row 2: its line must be a JSON object"),
        (
            b'{"a": "\\ud83d\\ude00"}\n{"a": "\\ud83d"}\n',
            "row 2: its text must be Unicode",
        ),
        (b'{"a": 1}\n[1]\n', "row 2: its line must be a JSON object, got '[1]'"),
        (b'{"a": 1}\n{"a": "\xff"}\n', "row 2: 'utf-8' codec can't decode byte 0xff"),
        (b'{"a": ' + b"[" * 100_000 + b"\n", "row 1: its line must be a JSON object"),
        (b"PAR1 and not more", "it must be a whole parquet file"),
    ],
)
def test_a_broken_file_is_refused_with_file_row_and_reason(tmp_path, content, wrong):
    if content.startswith(b"PAR1"):
        pytest.importorskip("pyarrow")
    path = tmp_path / "file.tsv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(f"{path}: {wrong}")):
        scanned(path)


def test_a_broken_parquet_page_is_refused(tmp_path):
    pytest.importorskip("pyarrow")
    path = tmp_path / "file.parquet"
    write_parquet(path, [{"index": number, "image": hf_image(number)} for number in range(20)], 100)
    content = bytearray(path.read_bytes())
    content[40:4000] = b"\xa5" * 3960
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(f"{path}: row 1: its page can't be read")):
        scanned(path)
    path.write_bytes(content[:-100])
    with pytest.raises(ValueError, match=re.escape(f"{path}: it must be a whole parquet file")):
        open_table(path)


def test_missing_files_and_empty_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"none: it can't be read: No such file"):
        open_table(tmp_path / "none")
    with pytest.raises(ValueError, match=r"a folder must hold \*\.parquet files, and this one holds none"):
        open_table(tmp_path)


def test_a_row_number_out_of_range_is_an_index_error(tmp_path):
    write_jsonl(tmp_path / "file.jsonl", [{"a": 1}])
    table, _ = scanned(tmp_path / "file.jsonl")
    with pytest.raises(IndexError):
        table.row(1)


@pytest.mark.parametrize("write", [write_tsv, write_jsonl, write_parquet])
def test_a_file_that_was_cut_or_changed_after_the_scan_is_not_read(tmp_path, write):
    if write is write_parquet:
        pytest.importorskip("pyarrow")
    path = tmp_path / "file"
    write(path, [{"index": str(number), "question": "What is it?"} for number in range(9)])
    whole = path.read_bytes()
    changed = (whole[:-9], whole[: len(whole) // 2], whole.replace(b"What", b"Whose"), b"")
    for content in changed:
        path.write_bytes(whole)
        table, _ = scanned(path)
        assert table.row(0)["index"] == "0"
        path.write_bytes(content)
        with pytest.raises(OSError, match=re.escape(f"{path}: it must stay as it is while it is used, and it was")):
            table.row(8)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(str(path))):
        table.row(8)


def write_large_tsv(path, rows):
    """A TSV in MMStar's layout whose rows all point to the image of the first."""
    tail = "\tWhat is shown in this picture of a kind that was never seen before?\tfox\tkite\tlamp\tdrum\tB"
    with open(path, "w", encoding="utf-8") as file:
        file.write("index\tquestion\tA\tB\tC\tD\tanswer\timage\n")
        file.write(f"0{tail}\t{base64_png(0)}\n")
        file.writelines(f"{number}{tail}\t0\n" for number in range(1, rows))


def grown_memory(path, script):
    """By how many bytes the peak memory of a process grows in a script that reads ``path``. It may not load torch."""
    script = f"""
import sys
from pathlib import Path
from llava_cot.evaluate.benchmarks import open_benchmark
from llava_cot.evaluate.files.table import open_table

def peak():  # getrusage would count the memory that the parent had
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024

path, before = sys.argv[1], peak()
{script}
assert "torch" not in sys.modules
print(peak() - before)
"""
    command = [sys.executable, "-c", script, str(path)]
    return int(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak memory of a process from /proc")
def test_memory_stays_flat_on_a_million_rows(tmp_path):
    write_large_tsv(tmp_path / "large.tsv", 1_000_000)
    assert (tmp_path / "large.tsv").stat().st_size > 95e6
    script = """
table = open_table(path)
assert sum(1 for row in table.scan()) == len(table) == 1_000_000
assert table.row(999_999)["index"] == "999999" and table.row(0)["index"] == "0"
"""
    assert grown_memory(tmp_path / "large.tsv", script) < 20e6  # 8 bytes a row, and some room


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak memory of a process from /proc")
def test_a_benchmark_keeps_little_of_a_row(tmp_path):
    write_large_tsv(tmp_path / "large.tsv", 100_000)
    script = """
benchmark = open_benchmark("mmstar", path)
assert benchmark.question(99_999).id == "99999" and benchmark.images(99_999) == benchmark.images(0)
"""
    assert grown_memory(tmp_path / "large.tsv", script) < 15e6  # of 10 MB of text, which are 100 MB as objects
