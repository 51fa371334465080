"""Each benchmark reads its real layouts as they were written, and refuses files that are wrong or not whole."""

import base64
import json
import pickle
import re
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec

import pytest
from helpers import benchmark_files as files
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from llava_cot.evaluate.benchmarks import BENCHMARKS, open_benchmark
from llava_cot.evaluate.benchmarks.mmstar import split_options
from llava_cot.evaluate.files.file_benchmark import FileBenchmark
from llava_cot.evaluate.files.known_files import KNOWN_FILES, KnownFile
from llava_cot.image import open_image

WRITERS = {
    ("mmstar", "tsv"): files.write_mmstar_tsv,
    ("mmstar", "parquet"): files.write_mmstar_parquet,
    ("mmbench", "tsv"): files.write_mmbench_tsv,
    ("mmbench", "parquet"): files.write_mmbench_parquet,
    ("mmvet", "tsv"): files.write_mmvet_tsv,
    ("mmvet", "parquet"): files.write_mmvet_parquet,
    ("mathvista", "tsv"): files.write_mathvista_tsv,
    ("mathvista", "parquet"): files.write_mathvista_parquet,
    ("ai2d", "tsv"): files.write_ai2d_tsv,
    ("ai2d", "parquet"): files.write_ai2d_parquet,
    ("ai2d_unmasked", "tsv"): files.write_ai2d_tsv,
    ("hallusionbench", "tsv"): files.write_hallusion_tsv,
    ("hallusionbench", "parquet"): files.write_hallusion_parquet,
    ("custom", "jsonl"): files.write_custom_jsonl,
}
MADE_UP = ("mmstar", "mmbench", "mmvet", "mathvista", "ai2d", "hallusionbench")


def written(tmp_path, name, kind, **options):
    """A file of a benchmark, its path, and the rows in it."""
    if kind == "parquet":
        pytest.importorskip("pyarrow")
    path = tmp_path / f"data.{kind}"
    return path, WRITERS[name, kind](path, **options)


def opened(tmp_path, name, kind, **options):
    path, rows = written(tmp_path, name, kind, **options)
    return open_benchmark(name, path, allow_partial=True), rows


@pytest.mark.parametrize(("name", "kind"), list(WRITERS))
def test_every_layout_is_read(tmp_path, name, kind):
    benchmark, rows = opened(tmp_path, name, kind, seed=3)
    assert len(benchmark) == len(rows) and benchmark.dataset.path == str(tmp_path / f"data.{kind}")
    questions = [benchmark.question(number) for number in range(len(rows))]
    assert [benchmark.question(number) for number in reversed(range(len(rows)))] == questions[::-1]
    assert len({question.id for question in questions}) == len(rows)
    for number, question in enumerate(questions):
        assert benchmark.number_of(question.id) == number
        assert question.answer in (question.choices or {question.answer})
        assert benchmark.prompt(question, benchmark.default_preset)
        json.dumps(dict(question.fields))
        for image in benchmark.images(number):
            assert open_image(image).size == (12, 12)
    copy = pickle.loads(pickle.dumps(benchmark))
    assert copy.question(1) == questions[1] and copy.images(1) == benchmark.images(1)


def test_every_benchmark_that_reads_a_file_has_a_layout_here():
    assert {name for name, _ in WRITERS} == {
        name for name, kind in BENCHMARKS.items() if issubclass(kind, FileBenchmark)
    }


@pytest.mark.parametrize("name", ["mmstar", "ai2d"])
def test_an_image_is_the_bytes_of_its_cell(tmp_path, name):
    benchmark, rows = opened(tmp_path, name, "tsv")
    assert [benchmark.images(number) for number in range(len(rows))] == [
        (base64.b64decode(row["image"]),) for row in rows
    ]


def test_mmstar(tmp_path):
    benchmark, rows = opened(tmp_path, "mmstar", "tsv")
    question = benchmark.question(1)
    assert (question.id, question.kind, question.text) == ("1", "choice", rows[1]["question"])
    assert question.choices == {letter: rows[1][letter] for letter in "ABCD"}
    assert question.category == ("logical reasoning", "code")
    benchmark, rows = opened(tmp_path, "mmstar", "parquet")
    question = benchmark.question(0)
    assert question.text == "What is shown in picture 0?" and benchmark.dataset.note == ""
    assert rows[0]["question"].endswith(", ".join(f"{key}: {value}" for key, value in question.choices.items()))
    assert question.answer == rows[0]["answer"]


@pytest.mark.parametrize(
    ("question", "parts"),
    [
        ("Q?\nOptions: A: on the book., B: a cat, sitting., C: 3, 4, and 5, D: B: no", None),
        ("Q? Options: A: yes, B: no", ("Q?", {"A": "yes", "B": "no"})),
        ("Q\nChoices:\n(A) 1\n(B) 2\n\n(C) 3", ("Q", {"A": "1", "B": "2", "C": "3"})),
        ("Options: A: x?\nOptions:\nA. one\nB. A. two\nC. two. C. three", None),
        ("Q Options: A: 1 B: 2 C: 3", ("Q", {"A": "1", "B": "2", "C": "3"})),
        ("Which is it, A: this or B: that?", None),
        ("Q\nOptions: A: alone", None),
    ],
)
def test_options_in_the_text_of_a_question_are_split_from_it(question, parts):
    if "sitting" in question:
        parts = ("Q?", {"A": "on the book.", "B": "a cat, sitting.", "C": "3, 4, and 5", "D": "B: no"})
    if "three" in question:
        parts = ("Options: A: x?", {"A": "one", "B": "A. two", "C": "two. C. three"})
    assert split_options(question) == parts


def test_options_that_can_not_be_split_are_said_to_be_in_the_text(tmp_path):
    pytest.importorskip("pyarrow")
    rows = files.write_mmstar_parquet(tmp_path / "data")
    rows[2]["question"] = "Is it this or that?"
    files.write_parquet(tmp_path / "data", rows)
    benchmark = open_benchmark("mmstar", tmp_path / "data", allow_partial=True)
    assert benchmark.dataset.note == "Questions whose options could not be told from their text: 1."
    assert benchmark.question(2).text == "Is it this or that?" and list(benchmark.question(2).choices) == list("ABCD")
    assert benchmark.prompt(benchmark.question(2), "plain") == "Is it this or that?"


@pytest.mark.parametrize("kind", ["tsv", "parquet"])
def test_mmbench(tmp_path, kind):
    benchmark, rows = opened(tmp_path, "mmbench", kind)
    assert benchmark.headline == "circular_accuracy" and benchmark.is_grouped
    questions = [benchmark.question(number) for number in range(len(rows))]
    assert [question.group for question in questions] == [str(row["index"] % 1_000_000) for row in rows]
    assert {question.group: len(question.choices) for question in questions} == {"0": 4, "1": 3, "2": 2}
    assert {question.group: question.hint for question in questions}["1"] == "It was taken at night."
    assert questions[0].hint is None and questions[0].category == ("finegrained_perception", "object_localization")
    right = {group: {q.choices[q.answer] for q in questions if q.group == group} for group in "012"}
    assert [len(texts) for texts in right.values()] == [1, 1, 1]
    first = {group: next(n for n, q in enumerate(questions) if q.group == group) for group in "012"}
    assert all(benchmark.images(n) == benchmark.images(first[q.group]) for n, q in enumerate(questions))


@pytest.mark.parametrize("kind", ["tsv", "parquet"])
def test_mmvet(tmp_path, kind):
    benchmark, _ = opened(tmp_path, "mmvet", kind)
    question = benchmark.question(1)
    assert (question.id, question.kind, question.category) == ("v1_1", "graded", ("math,ocr",))
    assert "<AND>" in question.answer
    assert benchmark.tally([benchmark.question(0), question], [0.5, 1.0]) == {
        "accuracy": (1.5, 2),
        "ocr": (1.5, 2),
        "math": (1.0, 1),
    }


@pytest.mark.parametrize("kind", ["tsv", "parquet"])
def test_mathvista(tmp_path, kind):
    benchmark, _ = opened(tmp_path, "mathvista", kind, seed=5)
    rows = files.mathvista_rows(seed=5)
    choice, integer, decimal, several = (benchmark.question(number) for number in range(4))
    assert [question.kind for question in (choice, integer, decimal, several)] == ["choice", "open", "open", "open"]
    assert list(choice.choices.values()) == rows[0]["choices"] and choice.choices[choice.answer] == rows[0]["answer"]
    assert (choice.text, choice.fields["query"]) == ("How much is in picture 0?", rows[0]["query"])
    assert (integer.unit, integer.answer_type, integer.precision) == ("$", "integer", None)
    assert integer.text == "How much is in picture 1? (Unit: $)"
    assert (decimal.answer_type, decimal.precision, decimal.unit) == ("float", 2, None)
    assert (several.answer_type, several.answer, several.choices) == ("list", rows[3]["answer"], {})
    assert integer.category == ("math word problem",) and [choice.id, integer.id] == ["1", "2"]
    assert benchmark.tally([choice, integer], [1.0, 0.0]) == {
        "accuracy": (1.0, 2),
        "arithmetic reasoning": (1.0, 2),
        "statistical reasoning": (0.0, 1),
    }


def test_mathvista_never_evaluates_a_cell(tmp_path):
    path, rows = written(tmp_path, "mathvista", "tsv")
    for cell in ("__import__('os').remove('x')", "[" * 5_000, "(" * 5_000, "9" * 20_000, "{1: 2}", "['a', open('x')]"):
        rows[0]["choices"] = cell
        files.write_tsv(path, rows)
        with pytest.raises(ValueError, match=r"data\.tsv: row 1: choices must "):
            open_benchmark("mathvista", path)
    rows[0]["choices"] = json.dumps(["x", *files.NOUNS])
    files.write_tsv(path, rows)
    assert len(open_benchmark("mathvista", path, allow_partial=True).question(0).choices) == 9


def test_ai2d(tmp_path):
    benchmark, rows = opened(tmp_path, "ai2d", "tsv")
    assert benchmark.question(2).choices == {letter: rows[2][letter] for letter in "ABCD"}
    benchmark, rows = opened(tmp_path, "ai2d", "parquet")
    question = benchmark.question(4)
    assert question.choices[question.answer] == rows[4]["options"][int(rows[4]["answer"])]
    assert [benchmark.question(number).id for number in range(3)] == ["0", "1", "2"]


def test_the_variants_of_ai2d_are_told_apart_by_their_md5(tmp_path, monkeypatch):
    path, rows = written(tmp_path, "ai2d", "tsv")
    masked, unmasked = (open_benchmark(name, path, allow_partial=True) for name in ("ai2d", "ai2d_unmasked"))
    said = "The md5 of the file is unknown, so that nothing shows whether it is AI2D ({} labels)."
    assert masked.dataset.note == said.format("masked") and unmasked.dataset.note == said.format("unmasked")
    assert masked.dataset.variant is None and masked.dataset.is_partial
    monkeypatch.setitem(KNOWN_FILES, masked.dataset.md5, KnownFile("AI2D_TEST", "ai2d"))
    known = open_benchmark("ai2d", path).dataset
    assert known == replace(known, variant="AI2D_TEST", rows=len(rows), expected_rows=len(rows), note="")
    assert not known.is_partial
    with pytest.raises(ValueError, match=r"it is AI2D_TEST, which is not AI2D \(unmasked labels\); it belongs to ai2d"):
        open_benchmark("ai2d_unmasked", path, allow_partial=True)


@pytest.mark.parametrize("kind", ["tsv", "parquet"])
def test_hallusionbench(tmp_path, kind):
    benchmark, rows = opened(tmp_path, "hallusionbench", kind)
    questions = [benchmark.question(number) for number in range(len(rows))]
    assert {question.group for question in questions} == {"ocr_0", "chart_0", "math_1"}
    assert {question.answer for question in questions} == {"Yes", "No"}
    blind = [number for number, question in enumerate(questions) if not question.fields["has_image"]]
    assert blind and all(benchmark.images(number) == () for number in blind)
    assert benchmark.dataset.rows == len(rows) - len(blind)
    assert benchmark.dataset.note.startswith(f"Questions without an image: {len(blind)}.")
    assert questions[0].id == "VD_ocr_1_0_0_0" and questions[0].category == ("VD", "ocr")


@pytest.mark.parametrize("kind", ["tsv", "parquet"])
def test_hallusionbench_without_the_questions_that_have_no_image(tmp_path, kind):
    benchmark, rows = opened(tmp_path, "hallusionbench", kind, blind=False)
    assert benchmark.dataset.rows == len(rows) and benchmark.dataset.note == ""


def test_custom(tmp_path):
    benchmark, rows = opened(tmp_path, "custom", "jsonl")
    by_place, by_letter, by_text, is_open = (benchmark.question(number) for number in range(4))
    assert list(by_place.choices)[rows[0]["answer"]] == by_place.answer and by_place.hint == "Look closely."
    assert by_letter.answer == rows[1]["answer"] and by_text.choices[by_text.answer] == rows[2]["answer"]
    assert (is_open.kind, is_open.answer, is_open.unit, is_open.answer_type) == ("open", "42", "cm", "integer")
    assert [len(benchmark.images(number)) for number in range(4)] == [1, 1, 0, 1]
    assert benchmark.images(0) == (str(tmp_path / "picture-0-0.png"),) and by_place.id == "own-0"
    assert (benchmark.default_preset, benchmark.dataset.expected_rows) == ("plain", None)


def test_custom_takes_what_people_have(tmp_path):
    Image.new("RGB", (3, 2)).save(tmp_path / "a.b.png")
    uri = "data:image/png;base64," + files.base64_png(1)
    rows = [
        {"question": "Two?", "answer": "yes", "images": ["a.b.png", files.base64_png(0)]},
        {"question": "One?", "answer": 1, "choices": {"A": "x", "B": "y"}, "image": uri},
        {"question": "Number?", "answer": "2", "choices": ["1", "2"], "image_path": str(tmp_path / "a.b.png")},
        {"question": "Float?", "answer": 1.0, "choices": [1, 2]},
        {"question": "Columns?", "answer": "B", "A": "x", "B": "y", "id": 7},
        {"question": "How many?", "answer": 3},
    ]
    files.write_jsonl(tmp_path / "own.txt", rows)
    benchmark = open_benchmark("custom", tmp_path / "own.txt")
    questions = [benchmark.question(number) for number in range(len(rows))]
    assert [question.answer for question in questions] == ["Yes", "B", "B", "B", "B", "3"]
    assert [question.kind for question in questions] == ["yes_no", *["choice"] * 4, "open"]
    assert [question.id for question in questions] == ["0", "1", "2", "3", "7", "5"]
    sizes = [[open_image(image).size for image in benchmark.images(number)] for number in range(4)]
    assert sizes == [[(3, 2), (12, 12)], [(12, 12)], [(3, 2)], []]


def break_row(row, **cells):
    return lambda rows: rows[row].update(cells)


def drop_column(*names):
    return lambda rows: [row.pop(name) for row in rows for name in names]


def drop_row(index):
    return lambda rows: rows.remove(next(row for row in rows if str(row["index"]) == index))


@pytest.mark.parametrize(
    ("name", "breaking", "wrong"),
    [
        (
            "mmstar",
            drop_column("answer"),
            r"it lacks the columns \['answer'\] of MMStar .*It has \['index', 'question'",
        ),
        (
            "mmstar",
            drop_column("A", "C"),
            r"it lacks the columns \[.*\] of MMStar \(VLMEvalKit TSV: index, question, A",
        ),
        ("mathvista", drop_column("choices"), r"it lacks the columns \['choices'\] of MathVista"),
        ("hallusionbench", drop_column("l2-category"), r"it lacks the columns \['l2-category'\] of HallusionBench"),
        ("mmvet", drop_column("category"), r"it lacks the columns \['category'\] of MM-Vet"),
        ("mmstar", break_row(2, answer=""), r"row 3: it has no answer"),
        ("mmstar", break_row(2, answer="E"), r"row 3: its answer must be the letter of a choice, .* got 'E'"),
        ("mmstar", break_row(2, question=" "), r"row 3: it has no question"),
        ("mmstar", break_row(2, image=""), r"row 3: it has no image"),
        ("mmstar", break_row(5, index=2), r"rows 3 and 6 have the same index '2'"),
        ("mmbench", break_row(4, image="17"), r"row 5: its image must be that of row '17', which there is none of"),
        ("mmbench", break_row(4, image="1000000"), r"row 5: its image must be that of row '1000000', which has no im"),
        ("mmbench", break_row(4, image="2000001"), r"row 5: its image must be that of row '2000001', which"),
        ("mmbench", break_row(4, index="1e6"), r"row 5: index must be a whole number, got '1e6'"),
        ("mmbench", drop_row("1000000"), r"question 0 must have .* its 4 options; it lacks the indices \[1000000\]"),
        ("mmbench", drop_row("2000001"), r"question 1 must have .* its 3 options; it lacks the indices \[2000001\]"),
        ("mmvet", break_row(1, answer=""), r"row 2: it has no answer"),
        ("mathvista", break_row(1, answer=""), r"row 2: it has no answer"),
        ("mathvista", break_row(0, answer_option="Q"), r"row 1: its answer must be the letter of a choice"),
        ("mathvista", break_row(0, answer_option="", answer="?"), r"row 1: its answer must be one of its choices"),
        ("mathvista", break_row(1, answer_type="number"), r"row 2: answer_type must be one of \['text', 'integer'"),
        ("mathvista", break_row(1, precision="two"), r"row 2: precision must be a whole number, got 'two'"),
        ("ai2d", break_row(0, answer=""), r"row 1: it has no answer"),
        (
            "hallusionbench",
            break_row(1, answer="maybe"),
            r"row 2: its answer must be yes or no, or 1 or 0, got 'maybe'",
        ),
        ("hallusionbench", break_row(0, image=""), r"row 1: it has no image"),
        ("hallusionbench", break_row(0, index="7"), r"row 1: its index must be category_subcategory_.*, got '7'"),
        ("hallusionbench", drop_row("VD_ocr_1_0_0_1"), r".*; VD, set ocr_0, lacks question 1 about figure 0"),
        (
            "hallusionbench",
            lambda rows: rows.__setitem__(slice(None), [r for r in rows if not r["index"].startswith("VD_ocr_1_0_0")]),
            r".*; VD, set ocr_0, lacks question 0 about figure 0",
        ),
        (
            "hallusionbench",
            lambda rows: rows.__setitem__(slice(None), [r for r in rows if r["index"].startswith("VS_chart_0")]),
            r"it has no question with an image",
        ),
        (
            "hallusionbench",
            lambda rows: rows.__setitem__(slice(None), [r for r in rows if not r["index"].startswith("VS_chart_1")]),
            r".*; VS, set chart_0, lacks question 0 about figure 1",
        ),
    ],
)
def test_a_wrong_file_is_refused_with_what_is_missing(tmp_path, name, breaking, wrong):
    path, rows = written(tmp_path, name, "tsv")
    breaking(rows)
    files.write_tsv(path, rows)
    with pytest.raises(ValueError, match=rf"data\.tsv: {wrong}"):
        open_benchmark(name, path, allow_partial=True)


@pytest.mark.parametrize(
    ("cells", "wrong"),
    [
        ({"answer": 3}, "row 2: its answer must be the place of a choice, from 0 to 2, got 3"),
        ({"answer": -1}, "row 2: its answer must be the place of a choice, from 0 to 2, got -1"),
        ({"answer": "what"}, "row 2: its answer must name one of its choices"),
        ({"choices": ["B", "A"], "answer": "A"}, r"row 2: its answer .* 'A' may be any of \['A', 'B'\]"),
        ({"choices": 7}, "row 2: choices must be a list, got int"),
        ({"choices": ["x"] * 27}, "row 2: it must have at most 26 choices, got 27"),
        ({"answer": None}, "row 2: it has no answer"),
        ({"question": ["a"]}, "row 2: question must be text, got list"),
        ({"precision": "1.5"}, "row 2: precision must be a whole number, got '1.5'"),
        ({"choices": {"a": "cat", "b": "dog"}, "answer": "a"}, "row 2: its choices must be named by capital letters"),
        ({"precision": 10**17}, "row 2: precision must be at most 100 decimal places"),
        ({"image": "nowhere"}, "row 2: its image must be that of row 'nowhere', which there is none of"),
        ({"id": "own-0"}, "rows 1 and 2 have the same index 'own-0'"),
    ],
)
def test_a_wrong_row_of_your_own_is_refused(tmp_path, cells, wrong):
    path, rows = written(tmp_path, "custom", "jsonl")
    rows[1].update(cells)
    files.write_jsonl(path, rows)
    with pytest.raises(ValueError, match=rf"data\.jsonl: {wrong}"):
        open_benchmark("custom", path)


@pytest.mark.parametrize(
    ("image", "wrong"),
    [
        ("x" * 65 + "!", "row 2: its image must be base64, got 'xxxxxxxxxxxxxxxxxxxx'"),
        ("A" * 65, "row 2: its image must be base64"),
        ("gone.png", "row 2: its image must be a file, and there is none at"),
        ([3, "gone.png"], "row 2: its image must be bytes, base64 or a path, got int"),
    ],
)
def test_an_image_that_can_not_be_had_is_refused_when_it_is_asked_for(tmp_path, image, wrong):
    path, rows = written(tmp_path, "custom", "jsonl")
    rows[1].pop("image")
    rows[1]["images"] = image
    files.write_jsonl(path, rows)
    benchmark = open_benchmark("custom", path)
    assert benchmark.question(1).id == "own-1"
    with pytest.raises(ValueError, match=rf"data\.jsonl: {wrong}"):
        benchmark.images(1)


@pytest.mark.parametrize("name", MADE_UP)
def test_a_file_with_fewer_rows_than_were_published_needs_leave(tmp_path, name):
    path, _ = written(tmp_path, name, "tsv")
    expected = min(BENCHMARKS[name].published_rows)
    with pytest.raises(ValueError, match=rf"it has \d+ rows of .*, and {expected} were published; allow_partial"):
        open_benchmark(name, path)
    dataset = open_benchmark(name, path, allow_partial=True).dataset
    assert dataset.is_partial and dataset.expected_rows == expected


@pytest.mark.parametrize("cut", [0.05, 0.4, 0.9, 0.999])
@pytest.mark.parametrize("name", MADE_UP)
def test_a_truncated_file_is_refused(tmp_path, name, cut):
    path, _ = written(tmp_path, name, "tsv")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * cut)])
    with pytest.raises(ValueError, match=re.escape(str(path))):
        open_benchmark(name, path)


@pytest.mark.parametrize(
    ("name", "other", "wrong"),
    [
        ("mmstar", "mmvet", r"it lacks the columns \[.*\] of MMStar"),
        ("mmbench", "mathvista", r"it lacks the columns \['A', 'B'\] of MMBench"),
        ("mmbench", "mmstar", r"question 0 must have a row for each rotation of its 4 options"),
        ("mathvista", "ai2d", r"it lacks the columns \[.*\] of MathVista"),
        ("hallusionbench", "mmstar", r"it lacks the columns \['l2-category'\] of HallusionBench"),
        ("mmvet", "hallusionbench", r"row 1: its capabilities must be among \['rec', .*\], got 'VD'"),
    ],
)
def test_a_file_of_another_benchmark_is_refused(tmp_path, name, other, wrong):
    path, _ = written(tmp_path, other, "tsv")
    with pytest.raises(ValueError, match=rf"data\.tsv: {wrong}"):
        open_benchmark(name, path, allow_partial=True)


def test_a_file_with_more_rows_than_were_published_is_noted(tmp_path):
    path, _ = written(tmp_path, "mmvet", "tsv", rows=219)
    assert open_benchmark("mmvet", path).dataset.note == "The file has 219 rows, and published ones have 218."


@pytest.fixture(scope="module")
def good_files(tmp_path_factory):
    """The bytes of a good file of each benchmark, without parquet where pyarrow is missing."""
    folder = tmp_path_factory.mktemp("good")
    found = {}
    for (name, kind), write in WRITERS.items():
        if kind != "parquet" or find_spec("pyarrow"):
            write(folder / f"{name}.{kind}")
            found[name, kind] = (folder / f"{name}.{kind}").read_bytes()
    return found, folder


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_bytes_end_in_an_error_that_names_the_file(good_files, data):
    found, folder = good_files
    name, kind = data.draw(st.sampled_from(sorted(found)))
    content = bytearray(found[name, kind])
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(content)))
        content[place : place + data.draw(st.sampled_from([0, 1, 5]))] = data.draw(st.binary(max_size=3))
    path = folder / "damaged"
    path.write_bytes(content)
    with suppress_named(path):
        benchmark = open_benchmark(name, path, allow_partial=True)
        for number in range(len(benchmark)):
            assert benchmark.question(number).id
            with suppress_named(path):
                benchmark.images(number)


@contextmanager
def suppress_named(path):
    """A ValueError that names ``path`` is what is wanted; any other error is not."""
    try:
        yield
    except ValueError as error:
        assert str(path) in str(error), error


def test_no_file_is_refused():
    with pytest.raises(ValueError, match="data must be the file of MMStar, got none"):
        open_benchmark("mmstar")


def test_image_path_serves_where_there_is_no_base64(tmp_path):
    path, rows = written(tmp_path, "mmbench", "tsv")
    (tmp_path / "images").mkdir()
    for row in rows:
        if len(row["image"]) > 64:
            row["image_path"] = f"images/{row['index']}.png"
            (tmp_path / row["image_path"]).write_bytes(base64.b64decode(row["image"]))
            row["image"] = ""
        else:
            row["image_path"] = ""
    files.write_tsv(path, rows)
    benchmark = open_benchmark("mmbench", path, allow_partial=True)
    group = {question.group: n for n in range(len(rows)) for question in [benchmark.question(n)]}
    assert benchmark.images(group["1"]) == (str(tmp_path / "images" / "1.png"),)


def test_several_images_in_one_cell_are_read(tmp_path):
    path, rows = written(tmp_path, "mmstar", "tsv")
    rows[0]["image"] = str([files.base64_png(1), files.base64_png(2)])
    files.write_tsv(path, rows)
    assert open_benchmark("mmstar", path, allow_partial=True).images(0) == (files.png(1), files.png(2))
