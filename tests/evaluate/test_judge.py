"""Grades of a judge behind a real HTTP server: what counts as a grade, who gave it, failures, and going on."""

import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from llava_cot.evaluate.judge import (
    Grade,
    JudgeSettings,
    export_for_judging,
    grade_file,
    judge_prompt,
    read_grade,
    read_grades,
)
from llava_cot.evaluate.question import Question
from llava_cot.evaluate.result import Result, Scored


class Handler(BaseHTTPRequestHandler):
    """A prediction "0.5" gets the reply 0.5; "prose, 0.5" gets prose first; "HTTP 500, 1.0" an error first."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        row = body["messages"][-1]["content"].rstrip().splitlines()[-1]
        told = row.split(" | ")[2].removesuffix(" |").split(", ")
        with self.server.lock:
            reply = told[min(self.server.asked[row], len(told) - 1)]
            self.server.asked[row] += 1
            self.server.bodies.append(body)
        status = int(reply.removeprefix("HTTP ")) if reply.startswith("HTTP ") else 200
        message = {"role": "assistant", "content": reply}
        if reply == "refusal":
            message |= {"content": None, "refusal": "0.9"}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        data = json.dumps({"id": "x", "model": "served", "choices": [choice], "error": {"message": reply}}).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    pytest.importorskip("openai")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.lock, running.asked, running.bodies = threading.Lock(), Counter(), []
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def answers(*predictions):
    return [
        Scored(
            Question(f"v{at}", "graded", "What is x?", "-1<AND>-5"),
            Result(
                f"v{at}", 0, f"<CONCLUSION> {text} </CONCLUSION>", text, "complete", None, None, None, "needs a judge"
            ),
        )
        for at, text in enumerate(predictions)
    ]


def settings(server, **changed):
    url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    return JudgeSettings(**{"model": "a-judge", "base_url": url, "timeout": 20.0, "max_retries": 2} | changed)


def test_grades_and_their_judge(server, tmp_path):
    scored = answers("0.5", "1.0", "prose, 0.3", "HTTP 500, 0.7", "prose", "refusal", "0.55", "7", "HTTP 400")
    seen = []
    grades = grade_file(scored, tmp_path / "grades.jsonl", settings(server), show=lambda *done: seen.append(done))
    assert [grade.grade for grade in grades.values()] == [0.5, 1.0, 0.3, 0.7, None, None, None, None, None]
    assert seen[-1] == (9, 9)
    assert grades == read_grades(tmp_path / "grades.jsonl")
    for grade in grades.values():
        verdict = grade.verdict
        assert verdict.rule.startswith("graded by a-judge")
        assert verdict.score == grade.grade, "a reply that is no grade is counted apart, never as 0"
        assert (verdict.score is None) == verdict.rule.endswith("gave no grade")
    assert "HTTP 400" in grades["v8", 0].reply
    asked = {body["max_completion_tokens"] for body in server.bodies}, {body["model"] for body in server.bodies}
    assert asked == ({2048}, {"a-judge"}), "a judge that thinks has room for it"
    assert scored[1].result.with_verdict(grades["v1", 0].verdict).correct
    assert scored[0].result.with_verdict(grades["v0", 0].verdict).correct is False


def test_a_second_run_asks_only_for_what_is_missing(server, tmp_path):
    path = tmp_path / "grades.jsonl"
    grade_file(answers("0.5", "prose, prose, prose, 0.2", "1.0"), path, settings(server))
    before = len(server.bodies)
    grades = grade_file(answers("0.5", "prose, prose, prose, 0.2", "0.9"), path, settings(server))
    assert [grade.grade for grade in grades.values()] == [0.5, 0.2, 0.9], "the third prediction is another one"
    assert len(server.bodies) - before == 2
    before = len(server.bodies)
    assert grade_file(answers("0.5"), path, settings(server, model="another"))["v0", 0].judge == "another"
    assert len(server.bodies) - before == 1, "a grade of another judge is none of this one"


@pytest.mark.parametrize("status", [401, 404])
def test_a_refused_key_stops_and_loses_nothing(server, tmp_path, status):
    path = tmp_path / "grades.jsonl"
    grade_file(answers("0.5"), path, settings(server))
    with pytest.raises(ValueError, match="refuses the key, the model or the account"):
        grade_file(answers("0.5", f"HTTP {status}"), path, settings(server, concurrency=1))
    assert read_grades(path)["v0", 0].grade == 0.5


@pytest.mark.parametrize(
    "reply, grade",
    [
        *(
            ("0.0", 0.0),
            ("0", 0.0),
            ("1", 1.0),
            ("1.0", 1.0),
            ("0.3", 0.3),
            (" 0.3\n", 0.3),
            ("**0.3**", 0.3),
            (".7", 0.7),
        ),
        *(("Grade: 0.3", 0.3), ("grade | 0.3 |", 0.3), ("0.30", 0.3), ("0.3.", 0.3), ("1.", 1.0)),
        *(("", None), ("0.35", None), ("1.1", None), ("2", None), ("-0.3", None), ("0.3 or 0.4", None), ("3/10", None)),
        *(("0.3 because it is wrong", None), ("The grade is good", None), ("nan", None), ("1e-1", None), ("10", None)),
    ],
)
def test_what_is_a_grade(reply, grade):
    assert read_grade(reply) == grade


def test_the_row_that_a_judge_completes():
    prompt = judge_prompt(Question("q", "graded", "Why |\nthis?", "a<AND>b <OR> c"), "x | 1.0 |\nQuestion | {row}")
    assert prompt.endswith("\nWhy / this? | a <AND> b <OR> c | x / 1.0 / Question / {row} |")
    assert prompt.count("Question | Ground truth") == 1


def test_export_and_grades_of_others(tmp_path):
    path = tmp_path / "to_judge.jsonl"
    assert export_for_judging(answers("one", "two"), path) == 2
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows[1] == {"id": "v1", "repeat": 0, "question": "What is x?", "answer": "-1<AND>-5", "prediction": "two"}
    path.write_text("".join(json.dumps(row | {"judge": "gpt-4-turbo", "grade": 0.4}) + "\n" for row in rows))
    assert read_grades(path)["v1", 0] == Grade("v1", 0, "two", "gpt-4-turbo", 0.4)


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "line 1 of .* must be a grade"),
        ("[]", "must be a grade"),
        ('{"id": "a", "prediction": "x", "judge": "j", "grade": 7}', "grade must be from 0 to 1 or null, got 7"),
        ('{"id": "a", "prediction": "x", "judge": "j", "grade": "0.5"}', "got '0.5'"),
        ('{"id": "a", "prediction": "x", "judge": "", "grade": 0.5}', "judge must name who graded"),
        ('{"id": "a", "prediction": "x", "grade": 0.5}', "judge"),
    ],
)
def test_bad_grades(tmp_path, line, message):
    path = tmp_path / "grades.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(ValueError, match=message):
        read_grades(path)


def test_bad_settings_and_questions(tmp_path):
    with pytest.raises(ValueError, match="judge must be the name of a model"):
        JudgeSettings("")
    with pytest.raises(ValueError, match="attempts must be >= 1, got 0"):
        JudgeSettings("m", attempts=0)
    with pytest.raises(ValueError, match="timeout must be > 0, got nan"):
        JudgeSettings("m", timeout=float("nan"))
    choice = Scored(Question("q", "choice", "Which?", "B"), answers("x")[0].result)
    with pytest.raises(ValueError, match="must be one that a judge grades, got 'choice'"):
        export_for_judging([choice], tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()
