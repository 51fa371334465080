"""The folder of a run: what is read, what is skipped and what is refused."""

import json

import pytest
from helpers.runs import Letters, result, scored, write_run

from llava_cot.evaluate.folder import read_run, trace_stem


@pytest.fixture
def folder(tmp_path):
    return write_run(tmp_path / "run", Letters(), scored(Letters(), [1.0, None, "failed"]))


def test_a_run_is_read_as_it_was_written(folder):
    run = read_run(folder)
    assert run.results == [result(0, 1.0, tokens=100), result(1, None, tokens=101), result(2, "failed")]
    assert run.protocol["benchmark"] == "letters"
    assert run.scored(Letters()) == scored(Letters(), [1.0, None, "failed"])


def test_a_torn_last_line_is_skipped_and_a_whole_one_is_not(folder):
    file = folder / "results.jsonl"
    whole = json.dumps(result(3, 0.0).to_dict())
    for torn in (whole[:50], '{"id', whole[:-1], whole):  # a whole line ends in a line break
        with file.open("a") as end:
            end.write(torn)
        assert len(read_run(folder).results) == 3
        file.write_text(file.read_text().removesuffix(torn))
    file.write_text(file.read_text() + whole + "\n")
    assert len(read_run(folder).results) == 4


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "line 1 of '.*results.jsonl' must be a record of evaluate, got b'{"),
        ("[1]", "line 1 of '.*results.jsonl' must be a record of evaluate, got b'\\[1\\]"),
        ('{"id": "q1", "repeat": 0}', "line 1 of '.*results.jsonl' must be a record of evaluate, got "),
        (json.dumps(result(9, 1.0).to_dict() | {"id": 9}), "results.jsonl', line 1: must be a result, got id 9"),
        (json.dumps(result(2, 1.0).to_dict()), "results.jsonl', line 4: each id and repeat must stand once, got 'q2'"),
    ],
)
def test_another_bad_line_is_named(folder, line, message):
    file = folder / "results.jsonl"
    file.write_text(f"{line}\n" + file.read_text())
    with pytest.raises(ValueError, match=message):
        read_run(folder)


def test_what_is_no_run_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match=r"must be a folder that `llava-cot evaluate` wrote, got .* without run.json"):
        read_run(tmp_path)
    (folder / "run.json").write_text("{}")
    with pytest.raises(ValueError, match=r"run.json' must name its benchmark, got None"):
        read_run(folder)
    (folder / "run.json").write_text("[]")
    with pytest.raises(ValueError, match=r"run.json' must be an object, got list"):
        read_run(folder)
    (folder / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run.json' must be JSON, got "):
        read_run(folder)
    (folder / "results.jsonl").unlink()
    with pytest.raises(ValueError, match=r"without results.jsonl"):
        read_run(folder)


def test_every_id_has_a_file_name_of_its_own():
    ids = ["a", "a/b", "a_b", "../a", "é", "\ud83d", "x" * 300, "x" * 301, "a.1", "a.2", "a@2", ""]
    stems = [trace_stem(id, repeat) for id in ids for repeat in (0, 2)]
    assert len(set(stems)) == len(stems) and not any("/" in stem or len(stem) > 200 for stem in stems)
    assert trace_stem("shapes-800000") == "shapes-800000" and trace_stem("a", 2) == "a@2"
