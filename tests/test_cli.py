"""The command line: what it prints, what it writes, and how it fails."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.traces import two_retraces

from llava_cot import cli
from llava_cot.data import shapes
from llava_cot.scoring import SCORERS
from llava_cot.stages import render
from llava_cot.trace import read_trace

SAMPLE = shapes.sample(804_000)


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "shapes.png"
    SAMPLE.image.save(path)
    return str(path)


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command in this process; returns its exit status, stdout and stderr."""

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["llava-cot", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, *capsys.readouterr()

    return command


def test_answer_as_json_in_a_process_of_its_own(image):
    command = [sys.executable, "-c", "from llava_cot.cli import main; main()"]
    arguments = ["answer", image, SAMPLE.question, "--json", "--search", "greedy", "--max-new-tokens", "30"]
    done = subprocess.run(
        [*command, *arguments], env={"PYTHONPATH": ":".join(sys.path)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert list(answer["stages"]) == ["SUMMARY", "CAPTION", "REASONING", "CONCLUSION"]
    assert answer["conclusion"] == answer["stages"]["CONCLUSION"]["text"]
    assert answer["usage"]["image_encodings"] == 1 and 0 < answer["usage"]["generated_tokens"] <= 30


@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        ("validate", "rows.jsonl", "--images", ".", "--clean", "clean.jsonl", "--quarantine", "bad.jsonl"),
        ("annotate", "questions.jsonl", "out.jsonl", "--model", "any", "--dry-run"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_what_needs_no_model_imports_no_library_for_it(image, tmp_path, arguments):
    """Such a library takes seconds to import, and a machine that annotates may have no use for one."""
    turns = [{"from": "human", "value": "How many?"}, {"from": "gpt", "value": render(SAMPLE.stages)}]
    files = {
        "rows.jsonl": {"conversations": turns},
        "questions.jsonl": {"question": "How many?", "answer": "3"},
    }
    shutil.copy(image, tmp_path / "image.png")
    for name, row in files.items():
        (tmp_path / name).write_text(json.dumps({"id": "1", "image": "image.png", **row}) + "\n")
    code = """if True:
        import sys
        from llava_cot.cli import main
        try:
            main()
        except SystemExit as ended:
            loaded = {"torch", "transformers", "openai"} & set(sys.modules)
            sys.exit(ended.code or ", ".join(sorted(loaded)) or None)
    """
    command, path = [sys.executable, "-c", code, *arguments], {"PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_answer_and_its_trace(run, image, tmp_path):
    file = tmp_path / "trace.json"
    limits = ["--search", "swires:published", "--seed", "3", "--max-new-tokens", "60"]
    status, out, _ = run("answer", image, SAMPLE.question, *limits, "--trace", str(file))
    assert status == 0 and SAMPLE.question in out
    trace = json.loads(file.read_text())
    assert (trace["search"], trace["seed"]) == ("swires", 3)
    assert trace["config"]["pass_rank"] == 2 and trace["config"]["max_new_tokens"] == 60
    assert f"{trace['usage']['generated_tokens']} tokens drawn" in out


def test_a_scorer_and_a_budget(run, image):
    limits = ["--scorer", "vote", "--max-tokens", "150", "--max-seconds", "60", "--max-new-tokens", "160"]
    status, out, _ = run("answer", image, SAMPLE.question, "--search", "stage_beam", "--json", *limits)
    assert status == 0 and json.loads(out)["usage"]["generated_tokens"] <= 154
    status, _, error = run("answer", image, SAMPLE.question, "--search", "greedy", "--scorer", "vote")
    assert status == 2 and "scorer is not supported by search='greedy'" in error


def test_a_page_of_the_search(run, tmp_path):
    """The page knows the question, the image and the truth; ``report`` makes the rest of it from JSON."""
    file, other, trace = tmp_path / "out.html", tmp_path / "other.HTML", tmp_path / "trace.json"
    assert run("demo", "--seed", "800001", "--search", "swires:published", "--trace", str(file))[0] == 0
    page, sample = file.read_text("utf-8"), shapes.sample(800_001)
    assert page.startswith("<!doctype html>") and "data:image/png;base64," in page
    assert f">{sample.question}</h1>" in page and f'class="gold">{sample.answer} ' in page
    assert run("demo", "--seed", "800001", "--search", "swires:published", "--trace", str(trace))[0] == 0
    status, out, _ = run("report", str(trace), "--html", str(other))
    assert status == 0 and sample.question in " ".join(out.split()) and out.count("★ winner") == 4
    assert other.read_text("utf-8").count("<article") == page.count("<article") > 4


@pytest.mark.parametrize("content", [None, "", "[1]", '{"version": 1}', '{"version": 2}', b"\xff", "[" * 100_000])
def test_what_no_report_can_be_made_of(run, tmp_path, content):
    file = tmp_path / "[bad].json"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    status, _, err = run("report", str(file), "--html", str(tmp_path / "out.html"))
    assert status == 2 and err.count("\n") == 1 and "Traceback" not in err
    assert err.startswith("error: [bad].json: " if content is not None else "error: [Errno 2] No such file")
    assert "[bad].json" in err
    assert not (tmp_path / "out.html").exists()


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_a_search_that_fails_leaves_its_trace(run, image, tmp_path, monkeypatch, flags):
    def broken(spans):
        raise RuntimeError("the scorer is broken")

    monkeypatch.setitem(SCORERS, "broken", broken)
    file, page = tmp_path / "trace.json", tmp_path / "trace.html"
    asked = ["answer", image, SAMPLE.question, "--search", "stage_beam", "--max-new-tokens", "30", "--scorer", "broken"]
    with pytest.raises(RuntimeError, match="the scorer is broken"):
        run(*asked, "--trace", str(file), *flags)
    trace = read_trace(file).trace
    assert trace.failure.startswith("RuntimeError: the scorer is broken") and trace.nodes
    status, out, _ = run("report", str(file), "--html", str(page))
    assert status == 0 and "failed: RuntimeError: the scorer is broken" in " ".join(out.split())
    assert page.read_text("utf-8").count("<article") == len(trace.nodes)
    (tmp_path / "traces.jsonl").write_text(trace.to_json())
    status, _, err = run("report", str(tmp_path / "traces.jsonl"))
    assert status == 0 and err.startswith("failed: traces.jsonl, line 1: RuntimeError: the scorer is broken")


def test_a_report_loads_neither_torch_nor_transformers(tmp_path):
    file = tmp_path / "trace.json"
    file.write_text(two_retraces().to_json())
    code = (
        "import sys\nfrom llava_cot import cli\ntry: cli.main()\nexcept SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    arguments = ["report", str(file), "--html", str(tmp_path / "page.html")]
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, stdout=subprocess.DEVNULL)
    assert (tmp_path / "page.html").stat().st_size > 0


def test_a_report_of_many_traces(run, tmp_path):
    """What can't be read is said, listed as failed and not fatal."""
    traces, out_folder = tmp_path / "traces.jsonl", tmp_path / "pages"
    data = json.loads(two_retraces().to_json())
    lines = [{"trace": data, "gold": "4 & 5"}, data, {"trace": data, "gold": "6"}, {"version": 1}]
    traces.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    status, out, err = run("report", str(traces))
    assert status == 0 and "swires 3 50.0% of 2 3 3 153 86%" in " ".join(out.split())
    assert err == "failed: traces.jsonl, line 4: trace.version must be 7, got 1\n"
    assert not out_folder.exists()
    assert run("report", str(traces), "--html", str(out_folder))[:2] == (status, out)
    assert sorted(page.name for page in out_folder.iterdir()) == [*(f"0000{n}.html" for n in (1, 2, 3)), "index.html"]
    status, out, _ = run("report", str(tmp_path / "none.jsonl"))
    assert status == 2 and out == ""
    assert run("report", str(tmp_path / "pages"))[2].endswith("must hold traces as .json or .jsonl, got none\n")


@pytest.mark.parametrize("flag, scorer", [("--verifier", "verifier"), ("--no-verifier", "confidence")])
def test_who_scores_the_demo(run, tmp_path, flag, scorer):
    file = tmp_path / "trace.json"
    assert run("demo", "--seed", "800001", "--search", "stage_beam", flag, "--json", "--trace", str(file))[0] == 0
    assert json.loads(file.read_text())["config"]["scorer"] == scorer


def test_demo_shows_the_stages_and_the_truth(run):
    status, out, _ = run("demo", "--seed", "800001")
    assert status == 0
    for stage in ("SUMMARY", "CAPTION", "REASONING", "CONCLUSION"):
        assert stage in out
    verdict = " ".join(out.split()).partition(f"The truth is {shapes.sample(800_001).answer}: the answer ")[2]
    assert " is right. " in verdict or " is wrong. " in verdict


@pytest.mark.parametrize(
    "change, message",
    [
        ({"--search": "beam"}, "error: search must be one of ['best_of_n', 'greedy', 'majority', 'sample'"),
        ({"--search": "swires:mine"}, "error: search must be one of ['best_of_n', 'greedy', 'majority', 'sample'"),
        ({"--search": "greedy:published"}, "error: search must be one of ['best_of_n', 'greedy', 'majority', 'sample'"),
        ({"--grammar": "thoughts"}, "error: grammar must be one of ['llava-cot', 'think-answer', 'think'"),
        ({"image": "no [such] file[/].png"}, "error: image must be a readable image, got 'no [such] file[/].png'"),
        ({"question": " "}, "error: question must be a non-empty string, got ' '"),
        ({"--model": "no/such/folder/at/all"}, "error: "),
    ],
)
def test_bad_input_is_one_line_on_stderr(run, image, change, message):
    given = {"image": image, "question": "?", "--search": "greedy", "--model": "tiny", **change}
    image, question = given.pop("image"), given.pop("question")
    status, _, err = run("answer", image, question, *(part for option in given.items() for part in option))
    assert status == 2 and err.startswith(message)
    assert "Traceback" not in err and (err.count("\n") == 1 or "--model" in change)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"--search": "beam"}, "search must be one of"),
        ({"--search": "swires:mine"}, "search must be one of"),
        ({"--search": "greedy", "--scorer": "vote"}, "scorer is not supported by search='greedy'"),
        ({"--scorer": "taste"}, "scorer must be one of"),
        ({"image": "none.png"}, "image must be a readable image, got 'none.png': No such file"),
        ({"image": "."}, "image must be a readable image, got '.': it is not a file"),
        ({"question": " "}, "question must be a non-empty string"),
        ({"--trace": "no/such/folder/trace.html"}, "trace must be a file in a folder that exists, got 'no/such/folder"),
        ({"--trace": "."}, "trace must be a file in a folder that exists"),
        ({"--device": "nowhere"}, "device must be one that torch can use here, got 'nowhere': "),
        ({"--device": "cuda:99"}, "device must be one that torch can use here, got 'cuda:99': "),
    ],
)
def test_what_needs_no_weights_is_checked_before_they_are_loaded(run, image, monkeypatch, change, message):
    from llava_cot.generator import SwiresGenerator

    monkeypatch.setattr(SwiresGenerator, "from_pretrained", lambda *args, **kwargs: pytest.fail("weights were loaded"))
    given = {"image": image, "question": "?", **change}
    image, question = given.pop("image"), given.pop("question")
    status, _, err = run("answer", image, question, *(part for option in given.items() for part in option))
    assert status == 2 and err.startswith(f"error: {message}") and err.count("\n") == 1


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_without_unicode_shows_the_answer(image, monkeypatch, encoding):
    """Standard output is what a process has there: bytes behind a strict encoder."""
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding=encoding, errors="strict", write_through=True))
    arguments = ["answer", image, "How many? é … 图", "--search", "stage_beam", "--max-new-tokens", "8"]
    monkeypatch.setattr(sys, "argv", ["llava-cot", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    assert b"answer:" in shown.getvalue() and b"How many?" in shown.getvalue()


def test_what_a_model_writes_is_never_markup(run, image, monkeypatch):
    """Brackets in a candidate or an answer are text, also where they look like rich's markup."""
    from llava_cot.generator import SwiresGenerator

    written = "<CONCLUSION> [A] or [/b] </CONCLUSION>"
    monkeypatch.setattr(SwiresGenerator, "decode", lambda self, tokens: written if tokens else "")
    for search in ("swires", "greedy"):
        status, out, _ = run("answer", image, SAMPLE.question, "--search", search, "--max-new-tokens", "4")
        assert status == 0 and "answer: [A] or [/b]" in out
    status, out, _ = run("demo", "--seed", "800001", "--search", "greedy")
    assert status == 0 and "the answer '[A] or [/b]' is wrong." in out


def test_a_plan_and_quantised_weights(run):
    llama = str(Path(__file__).parents[1] / "configs" / "llama_3_2_11b_vision")
    status, out, _ = run("plan", llama, "--quantize", "int4")
    assert status == 0 and "16 candidates of 2,048 tokens after a prompt of 512 take 2,080 pages." in out
    assert "fits: 14.9 GB of 24 GB" in out
    status, out, _ = run("plan", llama, "--dtype", "bfloat16")
    assert status == 1 and "does not fit: 27.5 GB of 24 GB" in out
    assert run("plan", llama, "--gpu", "40GB")[0] == run("plan", "tiny", "--gpu", "1GB")[0] == 0
    for arguments, message in (
        (("plan", "/no/such/folder"), "name must be a folder or a hub name"),
        (("plan", "tiny", "--quantize", "int5"), "quantize must be one of"),
        (("plan", "tiny", "--dtype", "int8"), "dtype must be 'auto' or one of"),
        (("plan", "tiny", "--gpu", "24"), "gpu must be its memory in GB"),
        (("answer", "What?", "--quantize", "float8"), "device must be a GPU"),
        (("demo", "--json", "--quantize", "int5"), "quantize must be one of"),
    ):
        status, _, error = run(*arguments)
        assert status == 2 and message in error, arguments
