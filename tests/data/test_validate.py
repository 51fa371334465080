"""Validation of training data: no line is lost, changed or passed by mistake, and half a file is never seen."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from llava_cot import cli
from llava_cot.data import rows
from llava_cot.data.checks import LineChecks
from llava_cot.data.conversations import parse_conversation, read_conversations
from llava_cot.data.images import ImageChecks, image_hashes
from llava_cot.data.validate import validate_file
from llava_cot.stages import STAGES, render

ANSWER = render({stage: f"some {stage.lower()}" for stage in STAGES})
SUMMARY, CAPTION, REASONING, CONCLUSION = (f"<{stage}> some {stage.lower()} </{stage}>" for stage in STAGES)


def turns(*texts):
    return [{"from": ("human", "gpt")[index % 2], "value": text} for index, text in enumerate(texts)]


def row(**changes):
    made = {"id": "1", "image": "chartqa/a.png", "conversations": turns("How many?", ANSWER)} | changes
    return {key: value for key, value in made.items() if value is not None}


def answered(text):
    return row(conversations=turns("How many?", text))


def line_of(data):
    return json.dumps(data).encode() + b"\n"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of images good and bad, beside a file that is not in it."""
    base = tmp_path_factory.mktemp("data")
    folder = base / "images"
    (folder / "chartqa").mkdir(parents=True)
    picture = Image.effect_noise((64, 48), 50).convert("RGB")
    for name in ("chartqa/a.png", "chartqa/b.jpg", "../secret.png", "top.png"):
        picture.save(folder / name)
    whole = (folder / "chartqa/b.jpg").read_bytes()
    (folder / "chartqa/torn.jpg").write_bytes(whole[: len(whole) // 2])
    png = (folder / "chartqa/a.png").read_bytes()
    (folder / "chartqa/torn.png").write_bytes(png[:-200])
    (folder / "chartqa/text.png").write_text("<html>404</html>")
    (folder / "chartqa/empty.png").touch()
    Image.new("RGB", (400, 4)).save(folder / "chartqa/long.png")
    Image.new("CMYK", (8, 8)).save(folder / "chartqa/cmyk.jpg")
    (folder / "link.png").symlink_to(base / "secret.png")
    (folder / "inner.png").symlink_to(folder / "chartqa/a.png")
    (folder / "out").symlink_to(base)
    (folder / "loop.png").symlink_to(folder / "loop.png")
    os.mkfifo(folder / "pipe.png")
    return folder


@pytest.fixture(scope="module")
def check(images):
    return LineChecks(ImageChecks(images))


GOOD = [
    row(),
    row(id=7, image=["chartqa/a.png", "chartqa/b.jpg"]),
    row(image="top.png", extra=[1, {}]),
    row(image="inner.png"),
    row(image="link.png"),  # links are made by the folder's owner, as in the hub's cache; rows are not
    row(image="out/secret.png"),
    row(image="chartqa/../top.png"),
    row(conversations=turns("How many?", ANSWER, "Why, if a < b?", f"\n{ANSWER}\n")),
    answered(f"{SUMMARY}{CAPTION}{REASONING}{CONCLUSION}"),
    answered(ANSWER.replace("some reasoning", "x <b>is</b> 3 <image> > 2")),
]

BAD = [
    (answered(f"{SUMMARY} {CAPTION} {REASONING}"), "missing stage: conversations[1]: after REASONING comes CONCLUSION"),
    (answered("4"), "missing stage: conversations[1]: first comes SUMMARY, got the end"),
    (answered(ANSWER.lower()), "missing stage"),
    (answered(f"{ANSWER} {CAPTION}"), "repeated stage"),
    (answered(f"{SUMMARY} {ANSWER}"), "repeated stage"),
    (answered(ANSWER.removesuffix("</CONCLUSION>")), "unclosed stage: conversations[1]: CONCLUSION is not closed"),
    (answered(ANSWER.replace("</CAPTION>", "")), "unclosed stage: conversations[1]: <REASONING> opens inside CAPTION"),
    (answered(f"{SUMMARY} {REASONING} {CAPTION} {CONCLUSION}"), "misplaced tag: conversations[1]: after SUMMARY comes"),
    (answered(f"{ANSWER} </CAPTION>"), "misplaced tag: conversations[1]: </CAPTION> closes what is not open"),
    (answered(ANSWER.replace("some conclusion", " \n")), "empty conclusion: conversations[1]"),
    (answered(ANSWER.replace("some caption", "")), "empty caption: conversations[1]"),
    (answered(f"Sure! {ANSWER}"), "text outside of stages: conversations[1] has 'Sure!'"),
    (answered(f"{SUMMARY}, {CAPTION} {REASONING} {CONCLUSION}."), "text outside of stages: conversations[1] has ', .'"),
    (row(conversations=turns("?", ANSWER, "?", "4")), "missing stage: conversations[3]"),
    (row(conversations=turns("<image>\nHow many?", ANSWER)), "image placeholder: conversations[0] has <image>"),
    (row(conversations=turns("?", ANSWER, "<image_2>?", ANSWER)), "image placeholder: conversations[2] has <image_2>"),
    (answered(ANSWER.replace("some caption", "<|image|>")), "special token: conversations[1] has <|image|>"),
    (answered(ANSWER.replace("some caption", "\ud83d")), "not Unicode"),
    (row(conversations=turns("a \ufdd0?", ANSWER)), "not Unicode"),
    (row(conversations=turns("?", ANSWER)[::-1]), "wrong turns: conversations[0] must be from 'human', got 'gpt'"),
    (row(conversations=turns("?", ANSWER, "?")), "wrong turns: conversations must be a list of pairs of turns, got 3"),
    (row(conversations=turns("?", " ")), "wrong turns: conversations[1] must have a non-empty value"),
    (row(conversations=[]), "wrong turns"),
    (row(conversations=None), "wrong turns"),
    (row(id=None), "bad id: id must be a non-empty string, got None"),
    (row(image=3), "bad image field: image must be a path"),
    (row(image=""), "bad image field"),
    (row(image=None), "no image"),
    (row(image=[]), "no image"),
    ([1], "not an object: row must be an object, got list"),
    (None, "not an object"),
    (row(image="chartqa/none.png"), "missing image: 'chartqa/none.png' can't be found: No such file"),
    (row(image="chartqa"), "missing image: 'chartqa' is no file"),
    (row(image="pipe.png"), "missing image: 'pipe.png' is no file"),
    (row(image="loop.png"), "missing image"),
    (row(image="a\0b.png"), "missing image"),
    (row(image="a" * 9000), "missing image"),
    (row(image="../secret.png"), "image outside of the folder: '../secret.png'"),
    (row(image="chartqa/../../secret.png"), "image outside of the folder"),
    (row(image="/etc/hostname"), "image outside of the folder"),
    (row(image="out/../secret.png"), "image outside of the folder"),  # the folder above that of the link's target
    (row(image="chartqa/torn.jpg"), "unreadable image: 'chartqa/torn.jpg' can't be decoded"),
    (row(image="chartqa/torn.png"), "unreadable image"),
    (row(image="chartqa/text.png"), "unreadable image"),
    (row(image=["chartqa/a.png", "chartqa/text.png"]), "unreadable image"),
    (row(image="chartqa/empty.png"), "image of zero size"),
    (row(image="chartqa/long.png"), "extreme aspect: 'chartqa/long.png' has 400 x 4 pixels, more than 50 to 1"),
]

BAD_BYTES = [
    (b"{", "not JSON"),
    (b'{"id": NaN}', "not JSON: NaN is no JSON"),
    (b"[" * 100_000, "not JSON"),
    (b"\xef\xbb\xbf{}", "not JSON: Unexpected UTF-8 BOM"),
    (b'{"id": "\xff"}', "not UTF-8: byte 8 of the line is 0xff"),
    (b"{}{}", "not JSON: Extra data"),
    (b'{"image": "a", "image": "b"}', "not JSON: an object must have each key once, got 'image' twice"),
    (b"\0", "not JSON"),
]


@pytest.mark.parametrize("data", GOOD)
def test_good_rows(check, data):
    verdict = check(line_of(data))
    assert verdict.defect is None and verdict.id == str(data["id"]) and not verdict.warnings


@pytest.mark.parametrize("line, reason", [*((line_of(data), reason) for data, reason in BAD), *BAD_BYTES])
def test_bad_rows(check, line, reason):
    found = check(line).defect
    assert str(found).startswith(reason) and len(str(found)) < 600
    assert found.kind == reason.partition(":")[0]


def test_options(images, check):
    assert LineChecks(check.images, allow_text_only=True)(line_of(row(image=None))).defect is None
    long, torn = row(image="chartqa/long.png"), row(image="chartqa/torn.jpg")
    assert LineChecks(ImageChecks(images, max_aspect=100))(line_of(long)).defect is None
    undecoded = LineChecks(ImageChecks(images, decode=False))
    assert undecoded(line_of(torn)).defect is None
    assert undecoded(line_of(row(image="none.png"))).defect.kind == "missing image"


def test_what_is_kept_but_worth_a_look(check):
    leak = ANSWER.replace("some reasoning", "It matches the Standard Answer.")
    both = row(image="chartqa/cmyk.jpg", conversations=turns("?", leak))
    assert check(line_of(both)).warnings == ("image mode CMYK", "mentions a standard answer")
    asked = row(conversations=turns("Which is the standard answer?", ANSWER))
    assert check(line_of(asked)).warnings == ()


def test_images_of_a_benchmark_are_found_by_file_and_by_pixels(images, tmp_path):
    (tmp_path / "deep").mkdir()
    Image.open(images / "chartqa/a.png").save(tmp_path / "deep/other.bmp")  # the same pixels
    (tmp_path / "copy").write_bytes((images / "chartqa/b.jpg").read_bytes())
    (tmp_path / "labels.json").write_text("{}")
    check = LineChecks(ImageChecks(images, forbidden=image_hashes(tmp_path, workers=2)))
    for name, kind in (("a.png", "test image"), ("b.jpg", "test image"), ("cmyk.jpg", None)):
        defect = check(line_of(row(image=f"chartqa/{name}"))).defect
        assert (defect and defect.kind) == kind
    with pytest.raises(ValueError, match="decode must be on to compare images"):
        ImageChecks(images, decode=False, forbidden=image_hashes(tmp_path))
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match=r"test_images must be a folder of images, got none below '.*none'"):
        image_hashes(tmp_path / "none")


def split(folder, check, content, **options):
    """The report, the clean bytes, and the objects in quarantine."""
    data, clean, quarantine = (folder / f"{name}.jsonl" for name in ("data", "clean", "quarantine"))
    data.write_bytes(content)
    report = validate_file(data, clean, quarantine, check, **options)
    return report, clean.read_bytes(), [json.loads(line) for line in quarantine.read_bytes().split(b"\n")[:-1]]


def whole(content, clean, bad):
    """Asserts that every line of ``content`` is in one of the outputs, or blank, unchanged and in order."""
    raw = {entry["line"]: entry["raw"].encode("utf-8", "surrogateescape") for entry in bad}
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    lines = lines if lines[-1] else lines[:-1]
    kept = [line for number, line in enumerate(lines, 1) if line.strip() and number not in raw]
    assert all(lines[number - 1] == text for number, text in raw.items()) and [*raw] == sorted(raw)
    assert clean.removesuffix(b"\n") == b"\n".join(kept)
    return len(lines), len(kept)


def is_whole(report, content, clean, bad):
    number, kept = whole(content, clean, bad)
    assert report.lines == number == report.total.clean + report.total.quarantined + report.blank
    assert (report.total.clean, report.total.quarantined) == (kept, len(bad))


def test_clean_lines_are_the_input_byte_for_byte(check, tmp_path):
    content = b"".join(
        [
            b'{"conversations" : [ {"from":"human","value":"Caf\xc3\xa9?","weight":1.50}, {"value":'
            + json.dumps(ANSWER).encode()
            + b', "from":"gpt"}],"image":"chartqa/a.png", "id":"\\u0041"}\r\n',
            line_of(row(id="last")).strip(),
        ]
    )
    report, clean, bad = split(tmp_path, check, content)
    assert clean == content and bad == [] and report.to_dict()["clean"] == 2


def test_the_first_clean_line_of_an_id_is_kept(check, tmp_path):
    rows = [answered("4"), row(), row(id="2"), row(id=1), row()]
    report, clean, bad = split(tmp_path, check, b"\n".join(map(line_of, rows)))
    assert clean == line_of(rows[1]) + line_of(rows[2])
    assert [entry["line"] for entry in bad] == [1, 7, 9] and report.blank == 4
    assert [entry["reason"] for entry in bad[1:]] == ["duplicate id: '1' is that of line 3"] * 2


def test_the_report_counts_by_source(check, tmp_path):
    leak = ANSWER.replace("some reasoning", "the standard answer")
    rows = [row(), row(id="2"), row(id="2"), row(image="pisc/x.png"), row(image="top.png", id="3"), row(image=None), 5]
    rows += [row(id="4", conversations=turns("?", leak)), row(id="5", image="\x1b[31m/a.png")]
    content = b"".join(map(line_of, rows)) + b" \t\r\n"
    report, clean, bad = split(tmp_path, check, content, report=tmp_path / "report.json")
    is_whole(report, content, clean, bad)
    made = json.loads((tmp_path / "report.json").read_text())
    assert made == report.to_dict()
    sources = made.pop("sources")
    total = {"missing image": 2, "duplicate id": 1, "no image": 1, "not an object": 1}
    counted = {"lines": 10, "blank": 1, "clean": 4, "quarantined": 5, "reasons": total}
    assert made == counted | {"warnings": {"mentions a standard answer": 1}}
    assert sources["chartqa"] == {
        "clean": 3,
        "quarantined": 1,
        "reasons": {"duplicate id": 1},
        "warnings": {"mentions a standard answer": 1},
    }
    names = {"chartqa", "pisc", "(the folder itself)", "(no image)", "(unknown)", r"'\x1b[31m'"}
    assert set(sources) == names and sources["pisc"]["reasons"] == {"missing image": 1}


def test_garbage_has_no_end_of_sources(check, tmp_path):
    content = b"".join(line_of(row(image=f"{number}/a.png")) for number in range(1010))
    report, _, _ = split(tmp_path, check, content)
    assert len(report.sources) == 1001 and report.sources["(others)"].quarantined == 10


ROWS = st.sampled_from([*GOOD, *(data for data, _ in BAD)])
LINES = st.one_of(
    ROWS.map(lambda data: line_of(data)[:-1]),
    st.sampled_from([line for line, _ in BAD_BYTES if len(line) < 1000]),
    st.binary(max_size=40).map(lambda line: line.replace(b"\n", b"")),
    st.text(max_size=20).map(lambda text: text.replace("\n", "").encode("utf-8", "surrogatepass")),
    st.builds(lambda data, at: line_of(data)[:at], ROWS, st.integers(0, 400)).map(bytes.strip),
    st.sampled_from([b"", b" ", b"\t\r", b"\x0c"]),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(LINES, max_size=30), st.booleans())
def test_no_line_is_lost(check, tmp_path, lines, is_ended):
    content = b"\n".join(lines) + (b"\n" if is_ended and lines else b"")
    assume(not content.startswith((b"\xff\xfe", b"\xfe\xff", b"PAR1")))  # then it is no file of lines
    assume(not content.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["))  # or perhaps an array
    report, clean, bad = split(tmp_path, check, content)
    is_whole(report, content, clean, bad)
    assert not any(path.name.startswith(".") for path in tmp_path.iterdir())
    again, cleaned, worse = split(tmp_path, check, clean)
    assert cleaned == clean and not worse and again.total.clean == report.total.clean
    ids = [conversation.id for _, conversation in read_conversations(tmp_path / "clean.jsonl")]
    assert len(ids) == len(set(ids)) == report.total.clean


def many(count):
    """Lines good and bad, more than a chunk has."""
    bad = [line_of(data) for data, _ in BAD]
    for number in range(count):
        yield line_of(row(id=number)) if number % 3 else bad[number // 3 % len(bad)]


def test_workers_change_nothing(check, tmp_path):
    content = b"".join(many(500)) + line_of(row(id=1))
    alone = split(tmp_path, check, content)
    assert split(tmp_path, check, content, workers=2) == alone
    is_whole(alone[0], content, *alone[1:])


def test_bytes_are_reported_as_they_are_judged(check, tmp_path):
    content, seen = b"".join(many(300)), []
    split(tmp_path, check, content, advance=seen.append)
    assert sum(seen) == len(content) and len(seen) > 3


def test_an_endless_line_is_an_error(check, tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "MAX_ROW", 1000)
    message = r"row 2 of '.*data.jsonl' must have at most 1000 bytes, got more"
    with pytest.raises(ValueError, match=message):
        split(tmp_path, check, line_of(row()) + b"x" * 5000)
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]


@pytest.fixture
def run(monkeypatch, capsys, images, tmp_path):
    """Run the command in this process on ``tmp_path``; returns its exit status, stdout and stderr."""

    def command(*options, data="data.jsonl", clean="clean.jsonl", quarantine="bad.jsonl", folder=images):
        paths = ("--images", folder, "--clean", tmp_path / clean, "--quarantine", tmp_path / quarantine)
        monkeypatch.setattr(sys, "argv", ["llava-cot", "validate", *map(str, (tmp_path / data, *paths, *options))])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, *capsys.readouterr()

    return command


def test_the_command(run, tmp_path):
    (tmp_path / "data.jsonl").write_bytes(line_of(row()) + b"\n" + line_of(row()) + line_of(row(image="[x]/y.png")))
    status, out, err = run("--report", tmp_path / "report.json")
    shown = " ".join(err.split())
    assert status == 1 and out == "" and "4 lines, 1 of them blank" in shown
    assert "1 duplicate id" in shown and "[x]" in shown and "1 missing image" in shown
    assert json.loads((tmp_path / "report.json").read_text())["quarantined"] == 2
    assert (tmp_path / "clean.jsonl").read_bytes() == line_of(row())
    status, out, err = run(data="clean.jsonl", clean="again.jsonl")
    assert status == 0 and (tmp_path / "bad.jsonl").read_bytes() == b""
    (tmp_path / "data.jsonl").write_bytes(b"")
    assert run()[0] == 0 and (tmp_path / "clean.jsonl").read_bytes() == b""


def test_what_can_not_be_validated(run, tmp_path):
    (tmp_path / "data.jsonl").write_bytes(line_of(row()))
    (tmp_path / "linked.jsonl").symlink_to(tmp_path / "data.jsonl")
    before = sorted(tmp_path.iterdir())
    for options, paths, message in (
        ((), {"data": "none.jsonl"}, "No such file or directory"),
        ((), {"data": "."}, "data must be a file, got"),
        ((), {"clean": "data.jsonl"}, "clean must be another file than data, got"),
        ((), {"quarantine": "linked.jsonl"}, "quarantine must be another file than data, got"),
        ((), {"clean": "bad.jsonl"}, "quarantine must be another file than clean, got"),
        (("--report", tmp_path / "bad.jsonl"), {}, "report must be another file than quarantine, got"),
        ((), {"clean": "none/clean.jsonl"}, "clean must be a file in a folder that exists, got"),
        ((), {"quarantine": "."}, "quarantine must be a file in a folder that exists, got"),
        ((), {"folder": tmp_path / "none"}, "images must be a folder, got"),
        (("--test-images", tmp_path / "none"), {}, "test_images must be a folder of images, got none below"),
        (("--workers", "0"), {}, "Invalid value for '--workers'"),
        (("--max-aspect", "0.5"), {}, "Invalid value for '--max-aspect'"),
    ):
        status, out, err = run(*options, **paths)
        assert status == 2 and out == "" and message in err and "Traceback" not in err, (options, paths)
        assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("number, status, workers", [(signal.SIGINT, 130, 1), (signal.SIGTERM, 143, 2)])
def test_what_is_interrupted_leaves_nothing_behind(images, tmp_path, number, status, workers):
    data = tmp_path / "data.jsonl"
    with data.open("wb") as file:
        file.writelines(many(60_000))
    (tmp_path / "clean.jsonl").write_text("old\n")
    outputs = ["--clean", "clean.jsonl", "--quarantine", "bad.jsonl", "--workers", str(workers)]
    command = [sys.executable, "-c", "from llava_cot.cli import main; main()", "validate", "data.jsonl"]
    process = subprocess.Popen(
        [*command, "--images", str(images), *outputs],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": ":".join(sys.path)},
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background shell has it ignored
    )
    while not any(part.stat().st_size for part in tmp_path.glob(".*.part")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    assert process.wait() == status and b"Traceback" not in process.stderr.read()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clean.jsonl", "data.jsonl"]
    assert (tmp_path / "clean.jsonl").read_text() == "old\n"


def test_conversations_of_a_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(line_of(GOOD[0]) + b"\n" + line_of(GOOD[1]) + b"[1]\n")
    found = read_conversations(path)
    assert next(found) == (1, parse_conversation(GOOD[0])) and next(found) == (3, parse_conversation(GOOD[1]))
    with pytest.raises(ValueError, match=r"^row 4 of '.*rows.jsonl': row must be an object, got list$"):
        next(found)
    path.write_bytes(b"\xff\n")
    with pytest.raises(ValueError, match=r"^row 1 of '.*rows.jsonl': 'utf-8' codec can't decode"):
        next(read_conversations(path))
