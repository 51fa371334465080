"""Two runs compared in pairs: the figures, the refusals, the page and the command."""

import json
import sys

import numpy as np
import pytest
from helpers.page import Page, ask, needs_browser
from helpers.runs import Circular, Graded, Letters, Mean, register, scored, write_run

from llava_cot import cli
from llava_cot.evaluate.benchmark import Dataset
from llava_cot.evaluate.compare import compare_runs
from llava_cot.evaluate.folder import read_run
from llava_cot.evaluate.pages.compare_page import to_html, to_text
from llava_cot.evaluate.statistics import mcnemar

pytest.importorskip("scipy")
FIRST, SECOND = [1.0] * 20 + [0.0] * 20, [1.0] * 12 + [0.0] * 8 + [1.0] * 2 + [None] * 17 + ["failed"]


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    register(monkeypatch)


@pytest.fixture
def folders(tmp_path):
    """Two runs of a benchmark with these scores, one list for each repeat."""

    def write(benchmark, /, *runs, **changes):
        found = []
        for name, repeats in zip("ab", runs):
            rows = [row for repeat, scores in enumerate(repeats) for row in scored(benchmark(), scores, repeat)]
            own = {"search": f"search-{name}", "repeats": len(repeats), **(changes if name == "b" else {})}
            found.append(write_run(tmp_path / name, benchmark(), rows, **own))
        return found

    return write


def compared(folders):
    return compare_runs(*map(read_run, folders))


def test_plain_questions(folders):
    found = compared(folders(Letters, [FIRST], [SECOND]))
    assert (found["a"]["accuracy"], found["b"]["accuracy"], found["n"], found["groups"]) == (0.5, 0.35, 40, 40)
    assert found["difference"]["value"] == pytest.approx(-0.15)
    assert found["pairs"] == {
        "of": "questions", "both": 12, "only_a": 8, "only_b": 2, "neither": 18, "mcnemar": mcnemar(2, 8),
    }  # fmt: skip
    error = np.std([-1] * 8 + [1] * 2 + [0] * 30) / np.sqrt(40)
    low, high = found["difference"]["interval"]
    assert (low, high) == pytest.approx((-0.15 - 1.96 * error, -0.15 + 1.96 * error), abs=0.02)
    assert (found["b"]["unparsed"], found["b"]["failed"], found["a"]["tokens"]) == (17, 1, 119.5)
    assert found["differs"] == [{"name": "search", "a": "search-a", "b": "search-b"}]
    assert [flip["id"] for flip in found["flips"]] == [f"q{n}" for n in range(12, 22)]
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_pairing_is_narrower_than_two_intervals(folders):
    second = FIRST.copy()
    second[30] = 1.0
    found = compared(folders(Letters, [FIRST], [second]))
    low, high = found["difference"]["interval"]
    assert 0 <= low < high < 0.1 and found["a"]["interval"][1] - found["a"]["interval"][0] > 0.25


def test_equal_runs_do_not_differ(folders):
    found = compared(folders(Letters, [FIRST], [FIRST]))
    assert found["difference"] == {"value": 0.0, "interval": [0.0, 0.0]} and found["pairs"]["mcnemar"] == 1.0
    assert found["flips"] == [] and "0 questions that A answers better" in to_text(found)


def test_groups_are_resampled_and_counted_whole(folders):
    second = FIRST.copy()
    second[0:2], second[20] = [0.0, 0.0], 1.0
    found = compared(folders(Circular, [FIRST], [second]))
    assert found["groups"] == 10 and found["difference"]["value"] == pytest.approx(-0.1)
    assert found["pairs"]["of"] == "groups" and (found["pairs"]["only_a"], found["pairs"]["only_b"]) == (1, 0)
    assert len(found["flips"]) == 3


def test_a_headline_made_of_others(folders):
    found = compared(folders(Mean, [FIRST], [SECOND]))
    assert found["difference"]["value"] == pytest.approx(found["b"]["accuracy"] - found["a"]["accuracy"])
    low, high = found["difference"]["interval"]
    assert low < found["difference"]["value"] < high and found["pairs"]["of"] == "questions"


@pytest.mark.parametrize("kind", [Letters, Graded])
def test_repeats_and_grades_have_no_mcnemar(folders, kind):
    grades = [score / 2 for score in FIRST]
    found = compared(folders(kind, [grades, FIRST], [FIRST]))
    assert found["pairs"] is None and found["a"]["repeats"] == 2
    assert found["difference"]["value"] == pytest.approx(0.125)
    assert "not for runs with repeats or grades" in to_text(found)


def test_unlike_runs_are_refused(folders):
    for changes, message in (
        (
            {"rules": "strict"},
            r"same rules, got 'compat' in .*a' and 'strict' in .*b'; `llava-cot score` can give both",
        ),
        ({"dataset": {"md5": "x"}}, r"runs must have the same file, got 'letters-1' in .* and 'x' in "),
        ({"benchmark": "mean"}, r"runs must have the same benchmark, got 'letters' in .* and 'mean' in "),
    ):
        with pytest.raises(ValueError, match=message):
            compared(folders(Letters, [FIRST], [FIRST], **changes))
    with pytest.raises(ValueError, match=r"same questions, got 3 only in '.*a', such as 'q37'$"):
        compared(folders(Letters, [FIRST], [FIRST[:-3]]))
    with pytest.raises(ValueError, match=r"runs must have results, got none in '.*a'"):
        compared(folders(Letters, [[]], [[]]))


def test_answers_beyond_the_limit_of_a_run_do_not_count(folders):
    second = [0.0] * 10 + FIRST[10:]
    a, b = folders(Letters, [FIRST, SECOND], [second])
    for folder in (a, b):  # the protocol of a run that was asked again with a smaller limit and no repeats
        protocol = json.loads((folder / "run.json").read_text()) | {"limit": 12, "repeats": 1}
        (folder / "run.json").write_text(json.dumps(protocol))
    found = compared([a, b])
    assert (found["n"], found["a"]["repeats"], len(found["flips"])) == (12, 1, 10)
    assert (found["a"]["accuracy"], found["b"]["accuracy"]) == (1.0, pytest.approx(1 / 6))
    (b / "run.json").write_text(json.dumps(protocol | {"limit": 14}))
    with pytest.raises(ValueError, match=r"same questions, got 2 only in '.*b', such as 'q12'$"):
        compared([a, b])


def test_another_file_than_the_runs_is_refused(folders, monkeypatch, tmp_path):
    a, b = map(read_run, folders(Letters, [FIRST], [SECOND]))
    with pytest.raises(ValueError, match=r"data must be the benchmark's file, got '.*none.tsv', which does not exist"):
        compare_runs(a, b, tmp_path / "none.tsv")
    other = Dataset(None, "other", None, rows=40)
    monkeypatch.setattr(Letters, "__init__", lambda self, path=None, **more: vars(self).update(dataset=other))
    with pytest.raises(
        ValueError, match=r"data must be the file of the runs, with md5 letters-1, got 'letters' with other"
    ):
        compare_runs(a, b)


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["llava-cot", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code, *capsys.readouterr()


def test_the_command(folders, monkeypatch, capsys, tmp_path):
    a, b = folders(Letters, [FIRST], [SECOND])
    code, out, _ = run(monkeypatch, capsys, "compare", a, b, "--html", tmp_path / "c.html")
    assert code == 0 and "| McNemar's exact test, p | 0.11 |" in out and "| B - A | -15.0 points |" in out
    assert "## 8 questions that A answers better\n\nq12, q13" in out and "| search | search-a | search-b |" in out
    assert "search-b" in (tmp_path / "c.html").read_text()
    code, out, _ = run(monkeypatch, capsys, "compare", a, b, "--json")
    assert code == 0 and json.loads(out)["pairs"]["only_a"] == 8
    code, _, error = run(monkeypatch, capsys, "compare", a, tmp_path)
    assert code == 2 and "run must be a folder that `llava-cot evaluate` wrote" in error
    code, _, error = run(monkeypatch, capsys, "compare", a, b, "--html", tmp_path / "none" / "c.html")
    assert code == 2 and "html must be a file in a folder that exists" in error


HOSTILE = "</script><img src=x onerror=alert(1)>"


def test_no_text_of_the_page_is_markup(folders):
    found = compared(folders(Letters, [FIRST], [SECOND]))
    names = set(Page(to_html(found)).names)
    found["flips"][0] |= {"id": HOSTILE, "question": HOSTILE, "gold": HOSTILE}
    found["flips"][0]["a"] |= {"text": HOSTILE, "answer": HOSTILE}
    found["differs"].append({"name": HOSTILE, "a": HOSTILE, "b": None})
    found["a"]["path"] = HOSTILE
    parsed = Page(to_html(found))
    assert not parsed.open and set(parsed.names) <= names and parsed.text.count(HOSTILE) >= 7


@needs_browser
def test_a_browser_filters_what_flipped(folders, tmp_path):
    file = tmp_path / "page.html"
    file.write_text(to_html(compared(folders(Letters, [FIRST], [SECOND]))), encoding="utf-8")
    probe = """
    const names = [...document.querySelectorAll("nav button")].map((button) => button.textContent);
    return [names, document.documentElement.scrollWidth - innerWidth];
    """
    names, overflow = ask(file, probe, "--window-size=420,900")
    assert names == ["all (10)", "only-a (8)", "only-b (2)"] and overflow <= 0
