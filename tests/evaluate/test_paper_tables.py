"""The paper's tables from run folders: rows, columns, notes, refusals, published rows and the command."""

import json
import re
import sys
from dataclasses import replace

import pytest
from helpers.page import Page
from helpers.runs import Circular, Letters, register, scored, write_run

from llava_cot import cli
from llava_cot.evaluate.benchmark import Dataset
from llava_cot.evaluate.pages.tables_page import to_html, to_markdown
from llava_cot.evaluate.published import PUBLISHED
from llava_cot.evaluate.tables import make_tables, read_entry


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    register(monkeypatch)


def named(name, title, variant=None, md5="1", base=Letters):
    """A benchmark of another name."""
    made = type(name, (base,), {"name": name, "title": title})()
    made.dataset = replace(Dataset(None, md5, None, rows=40), variant=variant)
    return made


@pytest.fixture
def entry(tmp_path):
    count = 0

    def write(benchmark=None, right=20, **changes):
        nonlocal count
        count += 1
        benchmark = benchmark or Letters()
        rows = scored(benchmark, [1.0] * right + [0.0] * (40 - right))
        return read_entry(write_run(tmp_path / f"run{count}", benchmark, rows, **changes))

    return write


def table(found, name):
    return {
        (row["model"], row["search"]): row for part in found["tables"] if part["name"] == name for row in part["rows"]
    }


def test_models_and_searches_are_rows_and_benchmarks_are_columns(entry):
    entries = [
        entry(None, right, model=model, model_sha256=model, search=search)
        for right, (model, search) in enumerate((m, s) for m in ("full", "direct") for s in ("greedy", "swires"))
    ]
    entries += [entry(Circular(), 40, model="full", model_sha256="full", search="swires")]
    entries += [
        entry(None, 7, model="other", model_sha256="o", search="best_of_n", settings={"n": 4, "max_new_tokens": 200})
    ]
    found = make_tables(entries)
    assert [column["title"] for column in found["columns"]] == ["Letters", "Circular"]
    main = table(found, "main")
    assert list(main) == [
        ("full", "greedy"),
        ("full", "swires"),
        ("direct", "greedy"),
        ("direct", "swires"),
        ("other", "best_of_n, n=4"),
    ]
    letters, circular = main["full", "swires"]["cells"]
    assert (letters["value"], circular["value"], main["full", "swires"]["mean"]) == (1 / 40, 1.0, (1 / 40 + 1) / 2)
    assert main["full", "greedy"]["cells"][1] is None and main["full", "greedy"]["mean"] is None
    assert letters["interval"] == entries[1].summary["interval"] and letters["tokens"] == 119.5
    assert (
        "rules compat" in found["notes"][letters["notes"][0] - 1] and "n 40" in found["notes"][letters["notes"][0] - 1]
    )
    assert list(table(found, "stages")) == [
        ("full", "greedy"),
        ("direct", "greedy"),
        ("full", "swires"),
        ("direct", "swires"),
    ]
    assert list(table(found, "searches")) == [
        ("full", "greedy"),
        ("full", "swires"),
        ("direct", "greedy"),
        ("direct", "swires"),
    ]
    assert len(found["notes"]) == 2  # one for each file
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    text = to_markdown(found)
    assert "| full | swires | 2.5 (0.4 to 12.9) [1] | 100.0 (72.2 to 100.0) [2] | 51.3 | 120 | this run |" in text


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"preset": "lmms"}, "preset"),
        ({"rules": "strict"}, "rules"),
        ({"settings": {"max_new_tokens": 2048}}, "settings.max_new_tokens"),
        ({"limit": 5}, "limit"),
        ({"repeats": 4}, "repeats"),
        ({"model_sha256": "other"}, "model_sha256"),
        ({"dataset": {"md5": "2", "rows": 5, "expected_rows": 9}}, "dataset.partial"),
    ],
)
def test_unlike_protocols_are_not_put_in_one_row(entry, changes, field):
    with pytest.raises(
        ValueError, match=rf"same {field}, got .* in '.*run1' and .* in '.*run2'; both are tiny, greedy"
    ):
        make_tables([entry(), entry(Circular(), **changes)])


@pytest.mark.parametrize("name, default", [("rules", "math"), ("preset", "plain")])
def test_each_benchmark_may_have_its_own_default(entry, monkeypatch, name, default):
    monkeypatch.setattr(Circular, f"default_{name}", default)
    usual = getattr(Letters, f"default_{name}")
    found = make_tables([entry(**{name: usual}), entry(Circular(), **{name: default})])
    assert len(found["tables"][0]["rows"]) == 1
    with pytest.raises(ValueError, match=f"must have the same {name}, got 'other' in .* and '{default}' in"):
        make_tables([entry(**{name: "other"}), entry(Circular(), **{name: default})])


def test_one_place_has_one_run(entry):
    with pytest.raises(ValueError, match=r"got two of tiny, greedy on letters: '.*run1' and '.*run2'"):
        make_tables([entry(), entry()])


def test_two_files_of_one_benchmark_are_two_columns(entry):
    found = make_tables([entry(named("mmbench", "MMBench", v, v)) for v in ("MMBench_DEV_EN", "MMBench_DEV_EN_V11")])
    assert [column["title"] for column in found["columns"]] == [
        "MMBench (MMBench_DEV_EN)",
        "MMBench (MMBench_DEV_EN_V11)",
    ]
    v6 = next(row for row in found["tables"][0]["rows"] if row["source"] and "v6" in row["source"]["name"])
    assert [len(cell["notes"]) for cell in v6["cells"]] == [1, 0]
    assert "† another protocol, version: 1.1 there, 1.0 here" in found["notes"]


def test_published_rows_stand_beside_and_unlike_ones_are_marked(entry):
    titles = {"mmstar": "MMStar", "ai2d": "AI2D", "ai2d_unmasked": "AI2D, unmasked", "mmvet": "MMVet"}
    benchmarks = [named(name, title) for name, title in titles.items()]
    found = make_tables([entry(benchmark) for benchmark in benchmarks])
    rows = [row for row in found["tables"][0]["rows"] if row["source"]]
    assert len(rows) == sum(row.table == "main" for row in PUBLISHED)
    (best,) = (row for row in rows if row["search"] == "SWIRES" and "v6" in row["source"]["name"])
    values = [cell["value"] for cell in best["cells"]]
    assert values == pytest.approx([0.625, 0.81, 0.81, 0.649])
    notes = [[found["notes"][number - 1] for number in cell["notes"]] for cell in best["cells"]]
    assert notes[0] == notes[1] == [] and "images: masked there, unmasked here" in notes[2][0]
    assert "judge: gpt-4 there, none here" in notes[3][0]
    assert "81.0 † [" in to_markdown(found)
    own = entry(benchmarks[-1])
    own.summary["rules"] = {"graded by GPT-4-turbo": 217, "graded by GPT-4-turbo, which gave no grade": 1}
    judged = make_tables([own])["tables"][0]["rows"][1]
    assert judged["source"] and judged["cells"][0]["notes"] == []
    part = make_tables([entry(benchmarks[0], limit=40)])
    assert "† another protocol, questions: all there, a part here" in part["notes"]


def test_the_world_has_no_published_rows(entry):
    assert all(row["source"] is None for part in make_tables([entry()])["tables"] for row in part["rows"])


def test_without_runs_there_are_the_published_tables():
    found = make_tables([])
    assert [part["name"] for part in found["tables"]] == ["main", "stages", "searches"]
    text = to_markdown(found)
    assert "| LLaVA-CoT | SWIRES | 62.5 | 77.6 | 64.9 | 57.7 | 81.0 | 49.1 | 65.5 | arXiv:2411.10440v6" in text
    assert all(row.source.name in text for row in PUBLISHED)
    means = re.findall(r"\| ([\d.]+) \| arXiv", text.partition("## Stages removed")[0])
    assert means == ["56.6", "59.0", "60.9", "62.4", "65.5"]  # as printed there
    parts = {part["name"]: [(row["model"], row["search"]) for row in part["rows"]] for part in found["tables"]}
    assert ("without REASONING", "sample") in parts["stages"] and ("LLaVA-CoT", "token beam") in parts["searches"]


def test_what_is_not_finished_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"runs must be folders of finished runs, got '.*' without summary.json"):
        read_entry(tmp_path)
    (tmp_path / "summary.json").write_text('{"title": "x"}')
    with pytest.raises(ValueError, match=r"summary.json' must be the summary of a run, got one without headline"):
        read_entry(tmp_path)


def test_the_page_escapes_everything(entry):
    hostile = "</script><img src=x onerror=alert(1)>"
    entries = [entry(model=hostile, search=search, preset=hostile) for search in ("greedy", hostile)]
    page = to_html(make_tables(entries))
    parsed = Page(page)
    assert not parsed.open and "img" not in parsed.names and parsed.text.count(hostile) > 5
    assert "default-src 'none'" in page and parsed.names.count("svg") == 1


def test_the_command(entry, monkeypatch, capsys, tmp_path):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["llava-cot", "tables", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, *capsys.readouterr()

    a, b = entry(search="greedy").path, entry(search="swires", right=30).path
    code, out, _ = run(a, b, "--html", tmp_path / "t.html")
    assert code == 0 and "## Searches" in out and "| tiny | swires | 75.0 (59.8 to 85.8) [1] | 120 | this run |" in out
    assert "75.0 (59.8 to 85.8) [1]" in Page((tmp_path / "t.html").read_text()).text
    code, out, _ = run("--json")
    assert code == 0 and json.loads(out)["tables"][0]["name"] == "main"
    code, _, error = run(a, tmp_path)
    assert code == 2 and "without summary.json" in error
